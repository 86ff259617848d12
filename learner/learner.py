"""One rank of the learner: a DeepSpeed engine around the policy, and the reference beside it.

``LearnerGroup`` runs it as Ray actors; ``Learner(config)`` also works in-process with hand-made groups. Invariants:
the policy version rises if and only if the optimizer changed the weights, and the gradient of an update does not
depend on how it was split into micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batching import MicroBatch, Row, Step, collate
from learner.choices import Choices
from learner.device_senders import make_sender
from learner.distributed import deepspeed_config, freed_at_once, join_group, wait_for_device
from learner.learner_state import load_state, save_all
from learner.logprobs import PolicyModel, Sampled
from learner.losses import LossInputs, LossSettings, grpo_loss
from learner.packing_proof import prove_packing
from learner.passes import Given, Passes, plan_batch
from learner.reference import Reference
from learner.step_metrics import over_updates, reduce_metrics, token_means
from shared import faults
from shared.config import Config
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, Prompt, RolloutGroup, StepReport
from shared.weights import Canary, Link, Publication


class Learner:
    """Trains the policy on groups: ``train_step``, ``sequence_logprobs``, ``save``."""

    def __init__(
        self, config: Config, rank: int = 0, world_size: int = 1, master: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        """Join the learner's process group and load the policy (and the reference, if a KL term needs it)."""
        self.config, self.rank, self.world_size = config, rank, world_size
        self._ledger = TimeLedger(f"learner-{rank}", settle=wait_for_device)
        self.policy_version = 0
        self._grad_norm = self._lr = float("nan")
        join_group(config, rank, world_size, master)
        self._choices = Choices(config)
        algorithm = config.algorithm
        self._kl_control = self._choices.kl_control(algorithm.kl.reward_coef or algorithm.kl.coef)
        self._entropy_bonus = self._choices.entropy_bonus()
        self.coefficients = {"kl": self._kl_control, "entropy": self._entropy_bonus}
        torch.manual_seed(config.run.seed)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        with freed_at_once():
            self._start()
        self._passes = Passes(config, self._choices, self._without_gradient, self.reference, self._ledger)
        self._ledger.enter("wait_for_groups")

    def _start(self) -> None:
        """Load the policy and the reference, each under DeepSpeed before the next is read."""
        import deepspeed

        config, settings = self.config, self.config.learner
        policy = PolicyModel.load(config)
        self._choices.needs_old_pass |= policy.has_dropout
        if settings.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()
        betas = settings.betas[0], settings.betas[1]
        rates = {"lr": settings.lr, "betas": betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.AdamW(policy.parameters(), **rates, fused=True)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
        )
        # In float32 at stage 0 DeepSpeed neither reports the norm nor notices a non-finite one.
        self.engine.clip_fp32_gradients = self._clip_float32
        self.engine.train()
        self.reference = None
        if config.needs_reference:
            full = self._choices.full_in_loss or self._choices.full_in_reward
            self.reference = Reference(config, PolicyModel.load(config), self.device, full)

    # --- training ---

    def train_step(self, groups: list[RolloutGroup], given: Given | None = None) -> StepReport:
        """All updates on one generated batch: ``epochs_per_batch`` times ``steps_per_batch`` optimizer steps.

        Every rank must get the same groups. ``given`` fixes advantages, old or reference log-probs from outside.
        """
        faults.point("learner.before_step")
        with self._ledger.during("plan"):
            report = self._train(groups, given or Given())
        faults.point("learner.after_step")
        return replace(report, times=self._ledger.take())

    def train_and_publish(
        self, groups: list[RolloutGroup], canary: np.ndarray
    ) -> tuple[StepReport, Publication | None]:
        """``train_step``, then ``publish`` if the weights changed: one call, so that nobody waits in between."""
        report = self.train_step(groups)
        return report, self.publish(canary) if report.applied else None

    def _train(self, groups: list[RolloutGroup], given: Given) -> StepReport:
        steps, scored = plan_batch(self.config, groups, self.rank, self.world_size, self.device)
        if not any(step.batches for step in steps):
            return StepReport(self.policy_version, False, scored.metrics)
        steps = self._passes.prepare(steps, scored, given.of(scored.kept), self._kl_coefs()[1])
        reports: list[dict[str, float]] = []
        before = self.policy_version
        for epoch in range(self.config.learner.epochs_per_batch):
            for i, step in enumerate(steps):
                if step.batches and step.lengths.any():
                    steps[i], report = self._update(step, keep_old=epoch + 1 < self.config.learner.epochs_per_batch)
                    reports.append(report)
        every = self.config.algorithm.reference_sync_steps
        # Between batches alone: within one, everything compares with the reference that it was prepared with.
        if self.reference is not None and every and self.policy_version // every > before // every:
            self.reference.follow(self.engine, self.config.algorithm.reference_sync_alpha)
        if self.config.algorithm.kl.reward_coef > 0:
            kl, per_token = scored.metrics["reward_kl"], scored.metrics["reward_kl_per_token"]
            self._kl_control.observe(kl, per_token, scored.rewards.numel())
        if not reports:
            return StepReport(self.policy_version, False, scored.metrics | {"trainable_tokens": 0.0})
        metrics = scored.metrics | over_updates(reports)
        metrics["updates"] = float(len(reports))
        return StepReport(self.policy_version, self.policy_version > before, metrics, scored.advantages)

    def sequence_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs ``[T - 1] float32`` of ``token_ids[1:]`` under the policy at temperature 1."""
        rest = token_ids[1:].astype(np.int32)
        completion = Completion(rest, np.zeros(len(rest), np.float32), "", "stop")
        row = Row(Prompt(0, token_ids[:1].astype(np.int32), ""), completion, 0, 0, len(rest))
        policy = self.engine.module
        sampled, policy.sampled = policy.sampled, Sampled()
        try:
            logprobs: np.ndarray = self._without_gradient(collate([row], self.device))[0][0].cpu().numpy()
            return logprobs
        finally:
            policy.sampled = sampled

    def _update(self, step: Step, keep_old: bool) -> tuple[Step, dict[str, float]]:
        """One optimizer step; with ``keep_old`` the returned step carries the old log-probs for later epochs."""
        scale = self._choices.entropy_schedule(self.policy_version, self.config.run.steps)
        entropy_coef = float(self._entropy_bonus.value) * scale
        settings = replace(self._choices.loss, kl_coef=self._kl_coefs()[0], entropy_coef=entropy_coef)
        sums: dict[str, float] = {}
        batches = []
        self.engine.train()
        for batch in step.batches:
            logprobs, found = self._accumulate(batch, settings, 1.0 / max(step.entropy_tokens, 1))
            batches.append(replace(batch, old_logprobs=logprobs) if keep_old and batch.old_logprobs is None else batch)
            for name, value in found.items():
                merge = max if name.endswith("_max") else min if name.endswith("_min") else float.__add__
                sums[name] = merge(sums[name], value) if name in sums else value
        self._step()
        metrics = token_means(reduce_metrics(sums)) | {"grad_norm": self._grad_norm, "learning_rate": self._lr}
        metrics |= {"kl_coef": self._kl_control.value, "entropy_coef": settings.entropy_coef}
        metrics["kl_control_skipped"] = float(self._kl_control.skipped)
        self._observe(metrics, step)
        return replace(step, batches=tuple(batches)), metrics | {"micro_batches": float(len(batches))}

    def _observe(self, metrics: dict[str, float], step: Step) -> None:
        """What an update measured moves the coefficients; the same on every rank."""
        tokens, sequences = int(step.lengths.sum()), len(step.lengths)
        kl = self.config.algorithm.kl
        if kl.coef > 0 and not kl.reward_coef:
            self._kl_control.observe(metrics["kl"] * tokens / sequences, metrics["kl"], sequences)
        self._entropy_bonus.observe(metrics["entropy"])

    def _kl_coefs(self) -> tuple[float, float]:
        """Coefficients of the KL in the loss and in the reward for the next update; a control steers one of them."""
        kl = self.config.algorithm.kl
        scale = self._choices.kl_schedule(self.policy_version, self.config.run.steps)
        steered = self._kl_control.value * scale
        return (kl.coef * scale, steered) if kl.reward_coef > 0 else (steered, 0.0)

    def _without_gradient(
        self, batch: MicroBatch, against: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's log-probs, entropies and KLs of a micro-batch, ``[B, C]`` each."""
        training = self.engine.training
        self.engine.eval()
        with torch.no_grad():
            result: tuple[Tensor, Tensor, Tensor] = self.engine(batch.tokens, against)
        self.engine.train(training)
        return result

    def _accumulate(
        self, batch: MicroBatch, settings: LossSettings, entropy_weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Forward and backward of one micro-batch; its detached log-probs, and its metrics as sums."""
        self._ledger.enter("forward")
        against = self.reference.against(batch) if self.reference is not None else None
        logprobs, entropy, full_kl = self.engine(batch.tokens, against)
        mask = batch.mask & torch.isfinite(logprobs)
        assert batch.advantages is not None
        assert batch.weights is not None
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        if self.config.algorithm.old_logprobs == "rollout":  # A token that the engine gave no number has ratio 1.
            old = torch.where(torch.isfinite(old), old, logprobs.detach())
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            rollout_logprobs=batch.rollout_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            weights=batch.weights,
            mask=mask if self._choices.truncates else batch.mask,
            full_kl=full_kl if against is not None else None,
            entropy=entropy,
            entropy_keep=batch.entropy_keep,
            entropy_weight=entropy_weight,
            importance_scale=batch.importance_scale,
        )
        loss, metrics = grpo_loss(inputs, settings)
        # The loss is already a sum weighted over the whole step. DeepSpeed averages gradients over the ranks and would
        # divide by accumulation steps: undo the first, switch off the second.
        self._ledger.enter("backward")
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        self._ledger.enter("plan")
        metrics |= {
            "loss": loss.detach(),
            "entropy_sum": torch.where(batch.mask, entropy.detach(), 0.0).sum(),
            "tokens": batch.mask.sum(),
        }
        return logprobs.detach(), {name: float(value) for name, value in metrics.items()}

    def _step(self) -> None:
        """Apply the accumulated gradient, on all ranks or on none: a non-finite one is dropped after its reduction."""
        self._lr = self.config.learner.lr * self._choices.schedule(self.policy_version, self.config.run.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._lr
        with self._ledger.during("optimizer"):
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        self._grad_norm = float(norm) if norm is not None else self._grad_norm
        applied = bool(np.isfinite(self._grad_norm)) and bool(self.engine.was_step_applied())
        self.policy_version += int(applied)

    def _clip_float32(self) -> None:
        """Clip by global norm; drop a non-finite gradient, which would ruin the weights for good."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm))
        if not np.isfinite(self._grad_norm):
            for parameter in parameters:
                parameter.grad = None

    # --- weights on their way out ---

    def open_sender(self, run_id: str) -> None:
        """Prove that packing is exact, then make room for publications; ``run_id`` names their shared memory.

        Raises ``ModelRefused``.
        """
        prove_packing(self.engine, self.device)
        self._sender: Any = make_sender(self.config, self.engine, self.device, run_id, self.rank)

    def listen(self, host: str) -> int:
        """Hold a port of ``host`` for the next link; its number."""
        return int(self._sender.listen(host))

    def connect(self, link: Link) -> None:
        """Meet the engines' workers, for publications that are sent over a device link."""
        self._sender.connect(link)

    def send(self, check: bool = False) -> str:
        """Send a collective publication; its fingerprints. With ``check``, compare the last one with the CPU's view of it."""
        with self._ledger.during("send"):
            return str(self._sender.check() if check else self._sender.send())

    def publish(self, canary: np.ndarray) -> Publication | None:
        """Snapshot the weights with the policy's log-probs of ``canary [T]``; rank 0 returns the publication.

        With colocated engines every rank returns one, for the engine on its GPU.
        """
        with self._ledger.during("canary"):
            proof = Canary(canary, self.sequence_logprobs(canary))
        with self._ledger.during("gather"):
            return self._sender.export(self.policy_version, proof)

    def times(self) -> TimeSlice:
        """What this rank did since it was asked last."""
        return self._ledger.take()

    def save(self, directory: str) -> None:
        """Write the policy in Hugging Face form to ``directory``/hf, and to ``directory``/learner all that ``load`` needs.

        Raises ``OSError``; on the rank that met it alone, for all that the ranks do together is done before.
        """
        with self._ledger.during("save"):
            save_all(self, directory)

    def load(self, directory: str) -> int:
        """Go on from what a whole ``save`` wrote, by any number of ranks; the policy version."""
        with self._ledger.during("load"):
            load_state(self, f"{directory}/learner")
        return self.policy_version
