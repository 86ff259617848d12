"""Every setting of a run: its meaning, default and check. Defaults live here and nowhere else.

``load_config`` reads TOML files from left to right, then ``--section.field value`` overrides, and validates the
result once, so a file and the command line get the same checks and the same one-line errors. What vLLM and
DeepSpeed own passes through untouched as ``rollout.vllm`` and ``learner.deepspeed``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import InputError, nearest, raise_all

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One table of the TOML file: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Choice(BaseModel):
    """An entry of one of the tables of functions: ``name`` plus that function's own keyword arguments."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """Name in the table, or ``package.module:function`` for one of your own."""

    @property
    def args(self) -> dict[str, Any]:
        """The keyword arguments given beside ``name``."""
        return dict(self.model_extra or {})


class Run(Section):
    output_dir: str = "runs/run"
    """Run folder. A relative path is taken from the working directory (under a Ray job: from ~/millrace)."""
    overwrite: bool = False
    """Empty an output_dir that holds an earlier run instead of refusing it."""
    seed: NonNegative = 0
    """Seeds data order, sampling and learner."""
    steps: Positive = 100
    """Optimizer steps to train."""
    samples_every: NonNegative = 10
    """Write the step's completions to samples/ every so many steps; 0 writes none."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """End the run when no step finishes for this long (start-up has its own limit)."""


class Model(Section):
    path: str
    """Hugging Face model directory with safetensors, or builtin:NAME for a small one made on demand."""
    tokenizer: str | None = None
    """Tokenizer directory; default: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engines and on the wire; the learner's master weights are float32."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Review it first."""


class Data(Section):
    train: str
    """Rows to train on: a .jsonl, .json, .csv or .parquet file, or builtin:NAME."""
    eval: str | None = None
    """Held-out rows, same forms; none: no evaluation."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    chat: bool = False
    """Wrap string prompts as one user message and apply the chat template."""
    system_prompt: str | None = None
    """System message put before every conversation."""
    shuffle: bool = True
    """Visit rows in a new random order each epoch (from run.seed)."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with blank prompts."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with prompts over rollout.max_prompt_tokens; they are never cut."""
    allow_overlap: bool = False
    """Accept evaluation prompts that also occur in the training rows."""


class Rollout(Section):
    num_engines: Positive = 1
    """vLLM replicas."""
    tensor_parallel_size: Positive = 1
    """GPUs (or CPU workers) that share one replica."""
    group_size: Positive = 8
    """Completions per prompt, G."""
    max_prompt_tokens: Positive = 512
    """Longest prompt accepted."""
    max_new_tokens: Positive = 512
    """Longest completion sampled."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the learner divides its logits by the same number."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must stay 1: the learner scores the full distribution."""
    top_k: NonNegative = 0
    """Must stay 0: the learner scores the full distribution."""
    min_p: Share = 0.0
    """Must stay 0: the learner scores the full distribution."""
    stop: list[str] = []
    """Strings that end a completion."""
    max_staleness: NonNegative = 1
    """Most optimizer steps between the oldest token of a group and its use; 0 is the synchronous mode."""
    kv_cache_gib: int | float = 1
    """KV cache per engine on CPU, whole GiB (on GPUs use rollout.vllm.gpu_memory_utilization)."""
    cpu_cores: str = "nobind"
    """CPU only: cores of the engines, one list per engine separated by "|", or nobind."""
    cpu_threads: Positive = 1
    """CPU only: threads per engine worker."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time one group may take to generate."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest time an engine may take to start."""
    canary_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest log-prob difference of the canary prompt; default 1e-3 in float32, 0.25 in bfloat16."""
    vllm: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs."""


class RewardFunction(Section):
    function: str
    """Built-in name, package.module:function, or path/to/file.py:function (relative to the configuration file)."""
    weight: float = 1.0
    """Factor in the combined reward; may be negative."""
    name: str | None = None
    """Metric name; default: the function's own name."""
    args: dict[str, Any] = {}
    """Constructor arguments of a class, or keyword arguments bound to a function."""


class Reward(Section):
    functions: list[RewardFunction] = Field(min_length=1)
    """One table per reward function; the combined reward is their weighted sum."""
    workers: Positive = 1
    """Reward worker processes."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time one call may take; then its worker is killed and replaced."""
    retries: NonNegative = 2
    """Further tries for a failed call before its group is dropped."""
    max_failed_groups: NonNegative = 100
    """Dropped groups that end the run."""
    max_failed_share: Share = 0.1
    """Share of the last 200 groups that, when dropped, ends the run."""


class Kl(Section):
    estimator: str = "k3"
    """Name in the KL_ESTIMATORS table."""
    coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term in the loss (beta); with 0 no reference model is loaded."""
    corrected: bool = False
    """Multiply by the importance ratio current/old."""


class ImportanceSampling(Section):
    level: Literal["none", "token", "sequence", "sequence_geometric"] = "token"
    """Unit of the weight old/rollout that corrects staleness and engine mismatch."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Clamp weights outside the bounds, or set them to 0."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Lower bound; none: unbounded."""
    high: Annotated[float, Field(gt=0)] | None = 3.0
    """Upper bound; none: unbounded."""


class Algorithm(Section):
    advantage: Choice = Choice(name="grpo")
    """Entry of the ADVANTAGES table."""
    policy_loss: Choice = Choice(name="clip")
    """Entry of the POLICY_LOSSES table."""
    aggregation: Choice = Choice(name="sequence_mean")
    """Entry of the AGGREGATIONS table."""
    kl: Kl = Kl()
    """KL to the reference model, in the loss."""
    old_logprobs: Literal["current", "recompute", "rollout"] = "current"
    """Where old log-probs come from: this forward pass, a pass before the update, or the engine."""
    importance_sampling: ImportanceSampling = ImportanceSampling()
    """Correction for the gap between engine and learner log-probs."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: train, leave out of the step, or replace by fresh groups."""
    mask_truncated: bool = False
    """Take completions that hit max_new_tokens out of the loss (their reward still counts)."""
    barren_limit: Positive = 1000
    """Groups without signal in a row that end the run."""


class Learner(Section):
    num_ranks: Positive = 1
    """Data-parallel learner processes (one GPU each where there are GPUs)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage."""
    prompts_per_step: Positive = 8
    """Groups in one optimizer step, N."""
    max_tokens_per_microbatch: Positive = 8192
    """Token budget of one packed micro-batch."""
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Choice = Choice(name="constant")
    """Entry of the SCHEDULES table: constant, linear or cosine, with warmup_steps and final_fraction."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    cpu_threads: Positive = 1
    """CPU only: threads per learner rank."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time one learner call may take."""
    max_skipped_steps: Positive = 5
    """Non-finite steps in a row that end the run."""
    deepspeed: dict[str, Any] = {}
    """Further keys of the DeepSpeed configuration."""


class Evaluation(Section):
    every_steps: NonNegative = 0
    """Evaluate every so many steps; 0: only before the first and after the last step."""
    max_rows: Positive = 1000
    """Rows of data.eval used."""
    max_new_tokens: Positive | None = None
    """Completion limit; default: rollout.max_new_tokens."""


class Config(Section):
    """The whole configuration of a run."""

    run: Run = Run()
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward
    algorithm: Algorithm = Algorithm()
    learner: Learner = Learner()
    eval: Evaluation = Evaluation()

    @property
    def max_model_len(self) -> int:
        """Longest sequence an engine must hold, in tokens."""
        return self.rollout.max_prompt_tokens + max(self.rollout.max_new_tokens, self.eval.max_new_tokens or 0)

    @property
    def completions_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.learner.prompts_per_step * self.rollout.group_size

    @property
    def canary_tolerance(self) -> float:
        """Largest accepted difference between engine and learner log-probs of the canary prompt, in nats."""
        return self.rollout.canary_tolerance or (1e-3 if self.model.dtype == "float32" else 0.25)


def load_config(files: list[str], overrides: dict[str, str] | None = None) -> Config:
    """Read TOML ``files`` left to right, apply ``overrides`` (dotted key to text) and validate.

    Raises ``InputError`` E105 for an unreadable file and ``InputErrors`` with every E101-E104, E106 and E108 found.
    """
    table: dict[str, Any] = {}
    origin = Path(files[-1]).name if files else "command line"
    for name in files:
        _merge(table, _read_toml(Path(name)))
    overrides = overrides or {}
    for key, text in overrides.items():
        _assign(table, key, text)
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        places = {key: f"command line:--{key}" for key in overrides}
        raise_all([_explain(detail, origin, places) for detail in error.errors()])
        raise
    raise_all(_disagreements(config, origin))
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        similar = nearest(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        fix = f"did you mean {path.parent / similar}?" if similar else "check the path"
        raise InputError("E105", "cannot read config", str(path), "no such file", "a TOML file", fix)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        raise InputError("E105", "cannot parse config", str(path), message, "valid TOML", "correct that line") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at offset {error.start}"
        raise InputError("E105", "cannot parse config", str(path), found, "UTF-8", "save it as UTF-8") from None


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        # A new ``name`` chooses another function: its predecessor's arguments would not fit, so it replaces the table.
        if isinstance(value, dict) and isinstance(old, dict) and "name" not in value:
            _merge(old, value)
        else:
            into[key] = value


def _assign(table: dict[str, Any], key: str, text: str) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError("E106", "bad override", f"command line:--{key}", f"{part} is not a table", "a known key", "see --help")
    annotation = field_annotation(key)
    if annotation is not None and "str" in str(annotation) and "list" not in str(annotation) and "dict" not in str(annotation):
        table[last] = None if text == "none" else text
        return
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def field_annotation(key: str) -> Any | None:
    """The declared type of a dotted key, or None if there is no such field."""
    model: Any = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        model = fields[part].annotation
    return model


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its pydantic field, in declaration order."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


_EXPECTED = {
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than_equal": "a number <= {le}",
    "literal_error": "{expected}",
    "float_type": "a number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "too_short": "at least {min_length} entries",
    "missing": "a value",
}


def _explain(detail: Any, origin: str, places: dict[str, str]) -> InputError:
    """One pydantic error as one of ours."""
    parts = [str(p) for p in detail["loc"] if p not in ("int", "float", "str", "constrained-float", "constrained-int")]
    key = ".".join(parts)
    overridden = next((place for k, place in places.items() if k == key or k.startswith(key + ".")), None)
    place = overridden or f"{origin}:{key}"
    if detail["type"] == "extra_forbidden":
        parent, last = parts[:-1], parts[-1]
        siblings = [k[len(".".join([*parent, ""])) :].split(".")[0] for k in known_keys() if k.startswith(".".join([*parent, ""]) if parent else "")]
        siblings = list(dict.fromkeys(siblings)) or list(RewardFunction.model_fields)
        guess = nearest(last, siblings)
        if overridden:
            fix = f"--{'.'.join([*parent, guess])}" if guess else "see --help"
            return InputError("E106", "bad override", place, last, "a known key", fix)
        fix = f"did you mean {'.'.join([*parent, guess])}?" if guess else "remove it"
        return InputError("E101", "unknown key", place, last, f"one of {', '.join(siblings)}", fix)
    template = _EXPECTED.get(detail["type"])
    expected = template.format(**detail.get("ctx", {})) if template else detail["msg"]
    found = "nothing" if detail["type"] == "missing" else repr(detail["input"])
    field = known_keys().get(key)
    default = getattr(field, "default", None)
    example = f"{parts[-1]} = {default!r}" if isinstance(default, str | int | float) else f"set {key}"
    code = "E106" if overridden else "E102"
    return InputError(code, "bad override" if overridden else "bad value", place, found, expected, example)


def _disagreements(c: Config, origin: str) -> list[InputError]:
    """Checks that involve more than one value (E103, E104, E108, E504)."""
    problems = []
    group_relative = c.algorithm.advantage.name != "reinforce_pp"
    if c.rollout.group_size < 2 and group_relative:
        problems.append(InputError("E103", "group too small", f"{origin}:rollout.group_size", str(c.rollout.group_size), ">= 2", "set 8; one completion has no group to compare with"))
    if c.completions_per_step % c.learner.num_ranks:
        near = max(1, round(c.completions_per_step / c.learner.num_ranks)) * c.learner.num_ranks
        problems.append(InputError("E104", "batch does not divide", f"{origin}:learner.prompts_per_step", f"{c.completions_per_step} completions", f"a multiple of learner.num_ranks = {c.learner.num_ranks}", f"use {near} completions (nearest)"))
    for key, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        value = getattr(c.rollout, key)
        if value != neutral:
            problems.append(InputError("E108", "options disagree", f"{origin}:rollout.{key}", str(value), f"{neutral} (the learner scores the full distribution)", f"rollout.{key} = {neutral}"))
    if c.algorithm.old_logprobs == "rollout" and c.algorithm.importance_sampling.level != "none":
        problems.append(InputError("E108", "options disagree", f"{origin}:algorithm.old_logprobs, algorithm.importance_sampling.level", f"rollout with {c.algorithm.importance_sampling.level}", 'level "none" (the correction would count twice)', 'algorithm.importance_sampling.level = "none"'))
    if not isinstance(c.rollout.kv_cache_gib, int) or c.rollout.kv_cache_gib < 1:
        problems.append(InputError("E504", "bad KV size", f"{origin}:rollout.kv_cache_gib", str(c.rollout.kv_cache_gib), "an integer >= 1", "rollout.kv_cache_gib = 1"))
    if c.max_model_len > c.learner.max_tokens_per_microbatch:
        problems.append(InputError("E108", "options disagree", f"{origin}:learner.max_tokens_per_microbatch", str(c.learner.max_tokens_per_microbatch), f">= {c.max_model_len} (one whole sequence)", f"learner.max_tokens_per_microbatch = {c.max_model_len}"))
    return problems
