"""Compare the learner's log-probs with transformers' own, on a small random model of the same class and configuration.

Finds what no list of keys can: attention that drops an argument, layers that leak between packed sequences, logits that are
changed after the output head. Kinds of layers, heads and positions stay those of the configuration, only sizes shrink.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from learner.attention import ATTENTION_NAME, register_attention
from learner.batching import Row, collate
from learner.logprobs import PolicyModel, Sampled
from shared.errors import InputError, one_line
from shared.types import Completion, Prompt

WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size")
WORDS, WIDE, MOST_LAYERS = 128, 64, 4
MOST_PARAMETERS = 100_000_000
"""Largest twin that is built: sizes under names that are not known here stay those of the whole model."""
WINDOW = 8
"""Tokens of a sliding window: fewer than a sequence has, so that the window counts."""
LENGTHS = (9, 5)
"""Tokens of two completions that are packed after one prompt."""
LARGEST_ERROR = 1e-3
"""Largest median difference of log-probs, in nats; rounding in float32 makes about 1e-6."""
_FOUND: dict[tuple[type, str], str] = {}
"""What was found, by class and configuration; empty if nothing is wrong."""


def check_twin(path: str, model: Any) -> None:
    """Raise ``InputError`` E412 if a small twin of ``model``, of the folder ``path``, gets other log-probs in the learner.

    A configuration of which no twin can be built is not judged here.
    """
    found = _objection(type(model), model.config.to_json_string(use_diff=False), model.config)
    if found:
        expected, fix = "the log-probs of transformers' own attention", "use another model"
        raise InputError("E412", "attention not supported", path, f"{type(model).__name__}, {found}", expected, fix)


def _objection(kind: type, text: str, config: Any) -> str:
    """Return what is wrong with models of the class ``kind`` and ``config``, whose ``text`` it is; once in a process."""
    if (kind, text) not in _FOUND:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # Matrices are too small for more.
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _FOUND[kind, text] = _compare(kind, config)
        finally:
            torch.set_num_threads(threads)
    return _FOUND[kind, text]


def _compare(kind: type, config: Any) -> str:
    try:
        plain = _twin(kind, config, "eager")
        tokens = torch.randint(3, WORDS, (8 + sum(LENGTHS),))
        wanted = _plain_logprobs(plain, tokens)
        ours = _twin(kind, config, ATTENTION_NAME)
        ours.load_state_dict(plain.state_dict())
    except Exception:  # Sizes of a strange configuration that do not shrink together.
        return ""
    try:
        found = _packed_logprobs(ours, tokens)
    except Exception as failure:  # What a model's code makes of arguments that it does not know.
        return f"which fails in the learner with {type(failure).__name__}: {one_line(failure, 120)}"
    error = max(float(np.median(np.abs(a - b))) for a, b in zip(found, wanted, strict=True))
    return "" if error <= LARGEST_ERROR else f"whose log-probs are wrong by {error:.2g} nats in the learner"


def _twin(kind: Any, whole: Any, attention: str) -> Any:
    """Return a random model of the class ``kind`` with ``attention``: the configuration ``whole``, made small."""
    register_attention()
    config = copy.deepcopy(whole)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) < heads
    _keep_layers(config)
    sizes = {"hidden_size": 2 * head, "num_attention_heads": 2, "vocab_size": WORDS, "initializer_range": 0.1}
    sizes |= dict.fromkeys(WIDTHS, WIDE) | {"word_embed_proj_dim": 2 * head, "first_k_dense_replace": 1}
    sizes |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1 if shared else 2)
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    made = kind._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    for vector in [parameter for parameter in made.parameters() if parameter.dim() == 1]:
        vector.data.add_(0.1 * torch.randn_like(vector))  # Biases and sinks of zero would show nothing.
    return made


def _keep_layers(config: Any) -> None:
    """Keep one layer of each kind, and two at least, where ``config`` has lists with an entry for each layer."""
    count = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kinds = [tuple(str(value[i]) for value in lists.values()) for i in range(count)]
    kept = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    kept = kept if len(kept) > 1 else list(range(min(2, count)))
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _sequences(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return the completions that follow the prompt, the first 8 of ``tokens``."""
    return list(tokens[8:].split(LENGTHS))


@torch.no_grad()
def _plain_logprobs(model: Any, tokens: torch.Tensor) -> list[np.ndarray]:
    """Return the log-probs of each completion by the library's forward pass, one sequence at a time."""
    found = []
    for rest in _sequences(tokens):
        ids = torch.cat([tokens[:8], rest])[None]
        logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, 7:-1].float(), -1)
        found.append(logprobs.gather(1, rest[:, None])[:, 0].numpy())
    return found


@torch.no_grad()
def _packed_logprobs(model: Any, tokens: torch.Tensor) -> list[np.ndarray]:
    """Return the same by the learner's forward pass over all of them packed."""
    prompt = Prompt(0, tokens[:8].numpy().astype(np.int32), "")
    rows = []
    for i, rest in enumerate(_sequences(tokens)):
        completion = Completion(rest.numpy().astype(np.int32), np.zeros(len(rest), np.float32), "", "stop")
        rows.append(Row(prompt, completion, i, 0, len(rest)))
    logprobs = PolicyModel(model, Sampled()).eval()(collate(rows, torch.device("cpu")).tokens)[0].numpy()
    return [logprobs[i, :length] for i, length in enumerate(LENGTHS)]
