"""Every setting of a run: its meaning, default and check. Defaults live here and nowhere else.

Models are frozen and strict and refuse unknown keys; ``shared/config_loader.py`` fills them from files and command
line. What vLLM and DeepSpeed own passes through untouched as ``rollout.vllm`` and ``learner.deepspeed``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from shared.config_algorithm import Algorithm, Choice, NonNegative, Positive, Section, Share
from shared.config_data import Data
from shared.config_reward import Reward

MAX_SEQUENCES = 1024
LEAST_TEMPERATURE = 0.01
"""vLLM samples at this temperature where a smaller one above 0 is asked for, and the learner would divide by another."""


class Run(Section):
    """The run as a whole."""

    output_dir: str = "runs/run"
    """Run folder. A relative path is taken from the working directory (under a Ray job: from ~/millrace)."""
    resume: Annotated[str, Field(pattern=r"^(auto|never|overwrite|\d+)$")] = "auto"
    """An output_dir that holds an earlier run: go on from its newest good checkpoint (auto) or from that of a step ("120"),
    refuse it (never), or replace it as soon as the new run has a checkpoint (overwrite)."""
    seed: NonNegative = 0
    """Seeds data order, sampling and learner."""
    steps: Positive = 100
    """Optimizer steps to train: a multiple of the updates per generated batch."""
    checkpoint_every: NonNegative = 50
    """Write a checkpoint every so many steps, beside the one at the end; 0: at the end alone."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; the best by eval.early_stopping stays beside them."""
    max_restarts: NonNegative = 5
    """Times that each engine, and the learner, is started again after it died or hung, before the run ends."""
    samples_every: NonNegative = 10
    """Write the step's completions to samples/ every so many steps; 0 writes none."""
    sinks: list[Choice] = []
    """Where metrics go beside metrics.jsonl: tensorboard, wandb (project, entity, ...), trackio (project, ...), prometheus."""
    trace: bool = False
    """Keep the whole timeline of all processes (ledger/trace.json, for Perfetto), not only the last 64 MB of it."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """End the run when no step finishes for this long (start-up has its own limit): longer than learner.step_timeout_s and
    twice rollout.request_timeout_s, which find who hangs and replace it."""


class Model(Section):
    """The policy to start from."""

    path: str
    """Hugging Face model directory with safetensors; org/name or org/name@COMMIT, which is downloaded from the hub once; or
    builtin:NAME for a small one made on demand."""
    tokenizer: str | None = None
    """Tokenizer directory, or org/name of the hub; default: the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in the engines and on the wire, float32 or bfloat16; the learner's master weights are float32."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Review it first: a directory, or a hub model at one commit, org/name@COMMIT."""


class Rollout(Section):
    """The engines and how they sample."""

    num_engines: Positive = 1
    """vLLM replicas that must be there to start."""
    max_engines: NonNegative = 0
    """Above num_engines: so many are asked for, and those beyond num_engines join whenever the cluster has room for them."""
    tensor_parallel_size: Positive = 1
    """Workers (a GPU each, or cpu_threads on CPUs) among which every layer of a replica is split; all on one node."""
    pipeline_parallel_size: Positive = 1
    """GPUs among which the layers of a replica are shared out; all on one node. Must be 1 on CPUs."""
    weights: Literal["auto", "host"] = "auto"
    """How new weights reach engines: auto: shared memory and the object store on CPUs, CUDA IPC when colocated, else NCCL; or as
    on CPUs, by a copy in host memory (host): the learner continues at once, and engines may come and go."""
    colocate: bool = False
    """GPUs only: every engine shares its GPU with one learner rank, instead of having one of its own."""
    group_size: Positive = 8
    """Completions per prompt, G."""
    max_prompt_tokens: Positive = 512
    """Longest prompt accepted."""
    max_new_tokens: Positive = 512
    """Longest completion sampled."""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE)] = 1.0
    """Sampling temperature; the learner divides its logits by the same number."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1 it needs truncated_sampling = "renormalise"."""
    top_k: NonNegative = 0
    """Sample from the k likeliest tokens; above 0 it needs truncated_sampling = "renormalise"."""
    min_p: Share = 0.0
    """Least probability relative to the likeliest token; above 0 it needs truncated_sampling = "renormalise"."""
    truncated_sampling: Literal["refuse", "renormalise"] = "refuse"
    """top_p, top_k and min_p: refuse them, or let the learner apply the same filter to its own distribution."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion, the end tokens of the model aside; special tokens such as <|im_end|> too."""
    max_staleness: NonNegative = 1
    """Most optimizer steps between the oldest token of a group and its first use; 0 is the synchronous mode."""
    max_stale_kv_gap: Annotated[float, Field(ge=0)] = 0.05
    """Mean log-prob change by a KV cache of older weights, in nats, above which it is dropped; 0 drops it each time."""
    kv_cache_gib: int | float = 1
    """KV cache per engine on CPU, over all its workers, whole GiB (on GPUs use rollout.vllm.gpu_memory_utilization)."""
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
    """Further arguments of vLLM's AsyncEngineArgs. On CPUs no prompt is prefilled in pieces, whatever they say."""

    def cores(self, engine: int) -> set[int] | None:
        """Cores of an engine, for example of ``0-3,6``; None: wherever the system puts it."""
        found: set[int] = set()
        for part in self.core_list(engine).split(","):
            first, _, last = part.partition("-")
            if not (first.isdigit() and (last or first).isdigit()):
                return None
            found |= set(range(int(first), int(last or first) + 1))
        return found

    def core_list(self, engine: int) -> str:
        """The part of ``cpu_cores`` that is an engine's."""
        lists = self.cpu_cores.split("|")
        return lists[engine] if len(lists) > 1 else lists[0]

    @property
    def workers_per_engine(self) -> int:
        """GPUs (or CPU workers) of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Learner(Section):
    """The optimizer and its processes."""

    num_ranks: Positive = 1
    """Data-parallel learner processes (one GPU each where there are GPUs)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage."""
    prompts_per_step: Positive = 8
    """Groups in one optimizer step, N."""
    steps_per_batch: Positive = 1
    """Optimizer steps into which one generated batch is cut: it holds prompts_per_step times as many groups."""
    epochs_per_batch: Positive = 1
    """Passes over each generated batch."""
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
    """When and how to evaluate."""

    every_steps: NonNegative = 0
    """Evaluate every so many steps; 0: only before the first and after the last step."""
    max_rows: Positive = 1000
    """Rows of data.eval used."""
    max_new_tokens: Positive | None = None
    """Completion limit; default: rollout.max_new_tokens."""
    samples: NonNegative = 0
    """Completions sampled of each row beside the greedy one, for pass@1, 2, 4, ... up to so many; 0: greedy alone."""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE)] | None = None
    """Of the sampled ones; default: rollout.temperature."""
    pass_reward: str | None = None
    """Reward function that says whether a completion solves its row; default: the one with the largest weight."""
    pass_value: float = 1.0
    """Least value of it that counts as solved."""
    early_stopping: Choice = Choice(name="best")
    """best: keep the best checkpoint by an evaluation metric (metric, mode, min_delta); patience (also patience, min_steps): and
    end when it stops improving; none: neither."""


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
    def groups_per_batch(self) -> int:
        """Groups generated and handed to the learner together."""
        return self.learner.prompts_per_step * self.learner.steps_per_batch

    @property
    def sequences_in_flight(self) -> int:
        """Completions that the buffer admits at the same time."""
        batches = self.rollout.max_staleness // self.updates_per_batch + 1
        return batches * self.groups_per_batch * self.rollout.group_size

    @property
    def max_num_seqs(self) -> int:
        """Completions that an engine samples at the same time: all that is in flight, within reason.

        Where the KV memory is full before, vLLM queues the rest.
        """
        ours = min(MAX_SEQUENCES, max(256, self.sequences_in_flight // self.rollout.num_engines))
        given = self.rollout.vllm.get("max_num_seqs", ours)
        return given if isinstance(given, int) else ours

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps on one generated batch."""
        return self.learner.steps_per_batch * self.learner.epochs_per_batch

    def batches_left(self, version: int) -> int:
        """Batches still to be trained after policy ``version``."""
        return -(-(self.run.steps - version) // self.updates_per_batch)

    @property
    def needs_reference(self) -> bool:
        """True if a KL term compares with a reference model."""
        return self.algorithm.kl.coef > 0 or self.algorithm.kl.reward_coef > 0

    @property
    def completions_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.learner.prompts_per_step * self.rollout.group_size

    @property
    def canary_tolerance(self) -> float:
        """Largest accepted difference between engine and learner log-probs of the canary prompt, in nats."""
        return self.rollout.canary_tolerance or (1e-3 if self.model.dtype == "float32" else 0.25)
