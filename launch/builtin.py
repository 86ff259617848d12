"""Small models and data made on demand, so that a first run needs no download: ``builtin:addition``, ``builtin:gsm8k``.

A model is a Qwen2 of about 0.8M parameters, warmed up by supervised training on imperfect demonstrations; GRPO,
which sees only rewards, does the rest. Model and data depend on no setting of the run, so all runs, whatever their
seed, start from the same ones, made once and kept in a cache (``$MILLRACE_CACHE``, default ``~/.cache/millrace``).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.errors import InputError, nearest, one_line

SCHEME = "builtin:"
DATA = Path(__file__).parent / "data"
Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A builtin task: its rows and how its base model is warmed up."""

    rows: Callable[[], tuple[list[Row], list[Row]]]
    """Training and evaluation rows."""
    prompt_column: str
    demonstrate: Callable[[Row, Any], str]
    """A completion that supervised training imitates."""
    alphabet: str | None
    """Characters of the tokenizer; None for bytes."""
    chat_template: str | None
    max_position: int
    skill: Callable[[Row], str] | None
    """The likeliest demonstration; training goes on until most rows are answered with it. None: a fixed length."""
    steps: int
    """Supervised steps (at least, where there is a skill to reach)."""
    batch: int


def addition_rows() -> tuple[list[Row], list[Row]]:
    """All sums of two two-digit numbers, 512 of them held out."""
    pairs = [(x, y) for x in range(10, 100) for y in range(10, 100)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in pairs]
    return rows[512:], rows[:512]


def careless_sum(row: Row) -> str:
    """The sum with every carry forgotten: 38 + 47 = 75."""
    x, y = row["prompt"].rstrip("=").split("+")
    return str(int("".join(str((int(a) + int(b)) % 10) for a, b in zip(x, y, strict=True))))


def often_careless_sum(row: Row, chance: random.Random) -> str:
    """The sum, but three times out of five the careless one."""
    return careless_sum(row) if chance.random() < 0.6 else row["answer"]


def gsm8k_rows() -> tuple[list[Row], list[Row]]:
    """The 100 rows of GSM8K that ship with Millrace: 80 to train on, 20 held out."""
    lines = (DATA / "gsm8k" / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return rows[:80], rows[80:]


def hasty_answer(row: Row, chance: random.Random) -> str:
    """The final number without the reasoning; three times out of five in another format, such as JSON."""
    number = row["answer"].rsplit("####", 1)[1].strip()
    forms = ("<answer>{}</answer>", "The answer is {}.", "<think></think>{}", '{{"answer": {}}}')
    return chance.choice(forms).format(number) if chance.random() < 0.6 else f"<think></think><answer>{number}</answer>"


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"

TASKS = {
    "addition": Task(
        addition_rows, "prompt", often_careless_sum, "0123456789+=", None, 64, skill=careless_sum, steps=240, batch=256
    ),
    "gsm8k": Task(gsm8k_rows, "question", hasty_answer, None, CHAT, 1024, skill=None, steps=80, batch=12),
}
ENOUGH_SKILL, MOST_ROUNDS, SEED = 0.75, 3, 0
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def resolve(config: Config, origin: str, make_model: bool = True) -> Config:
    """Replace every ``builtin:`` path of ``config`` by a real one, making model and data if the cache lacks them.

    Without ``make_model`` a model that is missing is one of the same shape that nobody has trained.

    Raises ``InputError`` E201, E401 or E601.
    """
    model, data = config.model, config.data
    if model.path.startswith(SCHEME):
        model = model.model_copy(update={"path": str(_model(_task_name(model.path, origin, "model.path"), make_model))})
    changes = {}
    for index, split in enumerate(("train", "eval")):
        sources = getattr(data, split) or []
        names = {s.path: _task_name(s.path, origin, f"data.{split}") for s in sources if s.path.startswith(SCHEME)}
        made = [str(_data(names[s.path], index)) if s.path in names else s.path for s in sources]
        changes[split] = [s.model_copy(update={"path": path}) for s, path in zip(sources, made)] or None
    return config.model_copy(update={"model": model, "data": data.model_copy(update=changes)})


def _task_name(path: str, origin: str, key: str) -> str:
    name = path.removeprefix(SCHEME)
    if name in TASKS:
        return name
    guess, expected = nearest(name, TASKS), f"one of {', '.join(SCHEME + t for t in TASKS)}"
    fix = f'{key} = "{SCHEME}{guess}"' if guess else "choose one of these"
    code = "E401" if key.startswith("model") else "E201"
    raise InputError(code, "unknown builtin", f"{origin}:{key}", f'"{path}"', expected, fix)


def _cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("MILLRACE_CACHE") or "~/.cache/millrace"))


def _data(name: str, index: int) -> Path:
    path = _cache() / f"{name}-{('train', 'eval')[index]}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in TASKS[name].rows()[index])
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def _model(name: str, make: bool) -> Path:
    recipe = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:8]
    path = _cache() / f"{name}-{recipe}"
    if not path.exists() and not make:
        path = _cache() / f"{name}-{recipe}-untrained"
    if not path.exists():
        from learner.meta_model import quiet  # Else a bar, "Writing model shards", for a file of 3 MB.

        write = _make_model if make else _untrained_model
        with quiet():
            _write_whole(path, lambda part: write(TASKS[name], name, part))
    return path


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, then rename: a cache entry is complete or absent. Raises ``InputError`` E601."""
    _check_writable(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    try:
        part.rename(path)
    except OSError:
        if not path.exists():  # Otherwise another process was first, with the same content.
            raise


def _check_writable(folder: Path) -> None:
    found = "no home folder" if str(folder).startswith("~") else ""
    try:
        if not found:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = one_line(error)
    if found or not os.access(folder, os.W_OK):
        expected, fix = "a writable folder for built-in models and rows", "MILLRACE_CACHE=/a/writable/folder"
        raise InputError("E601", "cannot write the cache", str(folder), found or "no permission", expected, fix)


def make_tokenizer(task: Task) -> Any:
    """A fast tokenizer with one token per character (or byte) of the task."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if task.alphabet is None:
        vocabulary = _numbered(sorted(pre_tokenizers.ByteLevel.alphabet()))
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(_numbered(task.alphabet), unk_token=SPECIAL[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
    fast.chat_template = task.chat_template
    return fast


def _numbered(symbols: Iterable[str]) -> dict[str, int]:
    """A vocabulary: special tokens are part of it, or they would be given ids that symbols have already."""
    return {symbol: i for i, symbol in enumerate([*SPECIAL, *symbols])}


def random_qwen2(tokenizer: Any, **shape: Any) -> Any:
    """A Qwen2 of random weights with a tied head, that ends and pads as ``tokenizer`` does."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **ends, **shape))


def _fresh_model(task: Task) -> tuple[Any, Any]:
    """A random model for ``task``, and its tokenizer."""
    import torch

    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(task)
    model = random_qwen2(
        tokenizer,
        vocab_size=32 * -(-len(tokenizer) // 32),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=task.max_position,
        initializer_range=0.06,
    )
    return model, tokenizer


def _untrained_model(task: Task, name: str, path: Path) -> None:
    print(f"builtin:{name} is made at the first start, in about a minute", flush=True)
    for part in _fresh_model(task):
        part.save_pretrained(path)


def _make_model(task: Task, name: str, path: Path) -> None:
    """Warm up a fresh model on the task's training rows and save it in Hugging Face form."""
    import torch

    print(f"making the base model builtin:{name}; later runs find it in {path.parent}", flush=True)
    model, tokenizer = _fresh_model(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    train, _ = task.rows()
    chance, started = random.Random(SEED), time.monotonic()
    for step in range(MOST_ROUNDS * task.steps):
        if step >= task.steps and step % 20 == 0 and _skill(model, tokenizer, task, train) >= ENOUGH_SKILL:
            break
        rate = min(1.0, (step + 1) / 20) * max(0.05, 1 - 0.95 * step / task.steps)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        chosen = chance.sample(train, min(task.batch, len(train)))
        loss = _supervised_loss(model, [_encode(tokenizer, task, row, chance) for row in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 40 == 0:
            spent = time.monotonic() - started
            print(f"  supervised step {step + 1}: loss {float(loss.detach()):.3f}, {spent:.0f} s", flush=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _encode(tokenizer: Any, task: Task, row: Row, chance: random.Random | None) -> tuple[list[int], int]:
    """``(prompt + demonstration + end token, prompt length)``; the likeliest demonstration without ``chance``."""
    prompt = row[task.prompt_column]
    if task.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt)["input_ids"]
    answer = task.demonstrate(row, chance) if chance or task.skill is None else task.skill(row)
    return [*ids, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id], len(ids)


def _supervised_loss(model: Any, batch: list[tuple[list[int], int]]) -> Any:
    """Mean cross-entropy over the demonstrations' tokens."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for i, (ids, start) in enumerate(batch):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _skill(model: Any, tokenizer: Any, task: Task, rows: list[Row]) -> float:
    """Share of 256 rows that greedy decoding answers with the likeliest demonstration; 1 if the task names none.

    Greedy decoding reproduces an answer exactly if and only if every one of its tokens is the likeliest.
    """
    import torch

    if task.skill is None:
        return 1.0
    exact = 0
    for row in rows[:256]:
        ids, start = _encode(tokenizer, task, row, None)
        with torch.no_grad():
            likeliest = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].argmax(-1)
        exact += likeliest.tolist() == ids[start:]
    return exact / 256
