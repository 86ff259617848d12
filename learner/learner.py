"""One rank of the learner: a DeepSpeed engine around the policy, and the frozen reference beside it.

``LearnerGroup`` runs it as Ray actors; ``Learner(config)`` also works in-process with hand-made groups. Invariants:
the policy version rises if and only if the optimizer changed the weights, and the gradient of a step does not
depend on how it was split into micro-batches and ranks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batching import TrainBatch, build_rows, collate, split
from learner.choices import Choices
from learner.distributed import deepspeed_config, join_group
from learner.logprobs import ATTENTION_NAME, PolicyModel, register_attention
from learner.losses import LossInputs, grpo_loss
from learner.weight_sender import NcclSender, ShmSender, full_tensors
from shared.config import Config
from shared.types import RolloutGroup, StepReport
from shared.weights import Canary, Link, Publication


class Learner:
    """Trains the policy on groups: ``train_step``, ``sequence_logprobs``, ``save``."""

    def __init__(
        self, config: Config, rank: int = 0, world_size: int = 1, master: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        """Join the learner's process group and load the policy (and the reference, if a KL term needs it)."""
        self.config, self.rank, self.world_size = config, rank, world_size
        self.policy_version = 0
        self._grad_norm = self._lr = float("nan")
        join_group(config, rank, world_size, master)
        import deepspeed

        self._choices = Choices(config)
        torch.manual_seed(config.run.seed)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        policy = self._load()
        if config.learner.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()
        settings = config.learner
        optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
        )
        # In float32 at stage 0 DeepSpeed neither reports the norm nor notices a non-finite one.
        self.engine.clip_fp32_gradients = self._clip_float32
        self.engine.train()
        self._reference = self._load_reference() if config.algorithm.kl.coef > 0 else None

    def train_step(self, groups: list[RolloutGroup]) -> StepReport:
        """One optimizer step on all of ``groups``; every rank must get the same ones."""
        started = time.monotonic()
        plan, metrics = self._plan(groups)
        mine = [collate(rows, self.device) for rows in plan[self.rank]]
        if not mine:
            return StepReport(self.policy_version, False, metrics)
        reference = [self._logprobs_of(self._reference, batch) for batch in mine] if self._reference is not None else []
        old = [self._logprobs_of(self.engine, batch) for batch in mine] if self._recompute else []
        sums: dict[str, float] = {}
        self.engine.train()
        for i, batch in enumerate(mine):
            found = self._accumulate(batch, reference[i] if reference else None, old[i] if old else None)
            for name, value in found.items():
                sums[name] = max(sums.get(name, 0.0), value) if name.endswith("_max") else sums.get(name, 0.0) + value
        applied = self._step()
        metrics |= self._reduce(sums) | {"grad_norm": self._grad_norm, "learning_rate": self._lr}
        metrics |= {"micro_batches": float(len(mine)), "time/train": time.monotonic() - started}
        return StepReport(self.policy_version, applied, metrics)

    def sequence_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs ``[T - 1] float32`` of ``token_ids[1:]`` under the policy at temperature 1."""
        from learner.batching import Row
        from shared.types import Completion, Prompt

        rest = token_ids[1:].astype(np.int32)
        completion = Completion(rest, np.zeros(len(rest), np.float32), "", "stop")
        row = Row(Prompt(0, token_ids[:1].astype(np.int32), ""), completion, 0, 0.0, 0.0, len(rest))
        policy = self.engine.module
        temperature, policy.temperature = policy.temperature, 1.0
        try:
            return self._logprobs_of(self.engine, collate([row], self.device))[0].cpu().numpy()
        finally:
            policy.temperature = temperature

    def open_sender(self, run_id: str) -> None:
        """Make room for publications; ``run_id`` names their shared memory."""
        first = self.rank == 0
        self._sender: ShmSender | NcclSender = (
            ShmSender(self.engine, run_id, first) if self.device.type == "cpu" else NcclSender(self.engine, first)
        )

    def connect(self, link: Link) -> None:
        """Meet the engines' workers, for publications that are sent over a device link."""
        assert isinstance(self._sender, NcclSender)
        self._sender.connect(link, self.rank)

    def send(self) -> str:
        """Send the weights of a collective publication; the digest of what was sent."""
        assert isinstance(self._sender, NcclSender)
        return self._sender.send()

    def publish(self, canary: np.ndarray) -> Publication | None:
        """Snapshot the weights with the policy's log-probs of ``canary [T]``; rank 0 returns the publication."""
        return self._sender.export(self.policy_version, Canary(canary, self.sequence_logprobs(canary)))

    def save(self, directory: str) -> str:
        """Write the policy in Hugging Face form (safetensors, config, tokenizer) and return the directory."""
        from transformers import AutoTokenizer

        state = {
            name: tensor.cpu().contiguous().clone() for name, tensor in full_tensors(self.engine) if self.rank == 0
        }
        if self.rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            model = self.engine.module.model
            model.config._attn_implementation = "sdpa"
            model.save_pretrained(directory, state_dict=state)
            model.config._attn_implementation = ATTENTION_NAME
            tokenizer = AutoTokenizer.from_pretrained(self.config.model.tokenizer or self.config.model.path)
            if self.config.model.chat_template:
                tokenizer.chat_template = self.config.model.chat_template
            tokenizer.save_pretrained(directory)
        return directory

    @property
    def _recompute(self) -> bool:
        return self.config.algorithm.old_logprobs == "recompute"

    def _load(self) -> PolicyModel:
        from transformers import AutoModelForCausalLM

        register_attention()
        config = self.config
        model = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=config.model.trust_remote_code,
        )
        return PolicyModel(model, config.rollout.temperature)

    def _load_reference(self) -> Any:
        """The frozen starting policy; partitioned over the ranks like the policy where that is."""
        reference = self._load().eval().requires_grad_(False)
        if self.config.learner.zero_stage < 3:
            return reference.to(self.device)
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=reference, config=deepspeed_config(self.config), dist_init_required=False
        )
        engine.eval()  # DeepSpeed's own returns nothing.
        return engine

    def _plan(self, groups: list[RolloutGroup]) -> tuple[list[list[list[Any]]], dict[str, float]]:
        """Advantages, loss weights and the split of the step: the same on every rank."""
        algorithm = self.config.algorithm
        metrics = {"groups": float(len(groups))}
        if algorithm.zero_variance != "keep":
            groups = [group for group in groups if group.has_signal()]
        if not groups:
            return [[] for _ in range(self.world_size)], metrics | {"groups/trained": 0.0}
        rewards = torch.tensor(np.stack([group.rewards for group in groups]))
        lengths = torch.tensor([[len(c.token_ids) for c in group.completions] for group in groups])
        advantages = self._choices.advantages(rewards, lengths)
        rows = build_rows(groups, advantages, self._choices.weights, mask_truncated=algorithm.mask_truncated)
        metrics |= {
            "groups/trained": float(len(groups)),
            "advantages/abs_mean": float(advantages.abs().mean()),
            "train_tokens": float(
                sum(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rows if r.trainable)
            ),
            "trainable_tokens": float(sum(row.trainable for row in rows)),
        }
        return split(rows, self.config.learner.max_tokens_per_microbatch, self.world_size), metrics

    @torch.no_grad()
    def _logprobs_of(self, model: Any, batch: TrainBatch) -> Tensor:
        training = model.training
        model.eval()
        logprobs, _ = model(batch.tokens)
        model.train(training)
        return logprobs

    def _accumulate(self, batch: TrainBatch, reference: Tensor | None, old: Tensor | None) -> dict[str, float]:
        """Forward and backward of one micro-batch; returns its metrics as sums."""
        logprobs, entropy = self.engine(batch.tokens)
        if old is None:
            old = batch.rollout_logprobs if self.config.algorithm.old_logprobs == "rollout" else logprobs.detach()
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            rollout_logprobs=batch.rollout_logprobs,
            ref_logprobs=reference,
            advantages=batch.advantages,
            weights=batch.weights,
            mask=batch.mask,
        )
        loss, metrics = grpo_loss(inputs, self._choices.loss)
        # The loss is already a sum weighted over the whole step. DeepSpeed averages gradients over the ranks and would
        # divide by accumulation steps: undo the first, switch off the second.
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        metrics |= {
            "loss": loss.detach(),
            "entropy_sum": (entropy.detach() * batch.mask).sum(),
            "tokens_sum": batch.mask.sum(),
        }
        return {name: float(value) for name, value in metrics.items()}

    def _step(self) -> bool:
        """Apply the accumulated gradient, on all ranks or on none: a non-finite one is dropped after its reduction."""
        self._lr = self.config.learner.lr * self._choices.schedule(self.policy_version, self.config.run.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        self._grad_norm = float(norm) if norm is not None else self._grad_norm
        applied = bool(np.isfinite(self._grad_norm)) and bool(self.engine.was_step_applied())
        self.policy_version += int(applied)
        return applied

    def _clip_float32(self) -> None:
        """Clip by global norm; drop a non-finite gradient, which would ruin the weights for good."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm))
        if not np.isfinite(self._grad_norm):
            for parameter in parameters:
                parameter.grad = None

    def _reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums and maxima over the micro-batches become the step's metrics, over all ranks."""
        if self.world_size > 1:
            maxima = [name for name in sums if name.endswith("_max")]
            totals = [name for name in sums if not name.endswith("_max")]
            for names, op in ((maxima, torch.distributed.ReduceOp.MAX), (totals, torch.distributed.ReduceOp.SUM)):
                values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
                torch.distributed.all_reduce(values, op)
                sums |= dict(zip(names, values.tolist(), strict=True))
        tokens = max(sums.pop("tokens_sum"), 1.0)
        mean = {name.removesuffix("_sum"): value / tokens for name, value in sums.items() if name.endswith("_sum")}
        rest = {name: value for name, value in sums.items() if not name.endswith("_sum")}
        renamed = {
            "gap_abs": "sync/logprob_gap",
            "gap_abs_max": "sync/logprob_gap_max",
            "ratio_low": "clip_ratio/low_mean",
            "ratio_high": "clip_ratio/high_mean",
            "is_weight": "importance_sampling/mean",
        }
        return {renamed.get(name, name): value for name, value in (mean | rest).items()}
