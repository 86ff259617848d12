"""The algorithm section of a configuration: the point in the space of GRPO variants.

Every choice is independent; ``algorithm.recipe`` names a good combination. Functions are chosen by name from the
learner's tables, with their keyword arguments beside the name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One table of the TOML file: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Choice(BaseModel):
    """An entry of one of the tables of functions: ``name`` plus that function's own keyword arguments; or a name alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """Name in the table, or ``package.module:function`` for one of your own."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @property
    def args(self) -> dict[str, Any]:
        """The keyword arguments given beside ``name``."""
        return dict(self.model_extra or {})


class Kl(Section):
    """KL between policy and reference: in the loss (``coef``, beta), in the reward (``reward_coef``, eta), or none."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term in the loss, beta. With it and reward_coef at 0 no reference model is loaded."""
    estimator: str = "k3"
    """KL in the loss: name in the KL_ESTIMATORS table, or full (over the whole vocabulary)."""
    corrected: Literal[False, True, "token", "sequence"] = False
    """KL in the loss: multiply by the importance ratio current/old. token: the token's; sequence: the geometric mean of the
    sequence's; true: what the policy loss takes (sequence_clip, gspo_token, gmpo, and with unit = "sequence": the sequence's)."""
    straight_through: Literal[False, True, "corrected"] = False
    """KL in the loss: keep the estimator's value, take k2's gradient (true) or that of the corrected estimator (corrected)."""
    reward_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL subtracted from the reward before the group statistics, eta."""
    reward_estimator: Literal["k1", "abs", "mse", "full"] = "k1"
    """KL in the reward: estimator."""
    schedule: Choice = Choice(name="constant")
    """Factor on coef and reward_coef: an entry of the SCHEDULES table."""
    control: Choice = Choice(name="fixed")
    """fixed, or adaptive: steers reward_coef (or, without it, coef) so that the KL stays near its target."""


class ImportanceSampling(Section):
    """Correction for tokens sampled by older weights or another implementation."""

    level: Literal["none", "token", "sequence", "sequence_geometric"] = "token"
    """Unit of the weight old/rollout that corrects staleness and engine mismatch."""
    mode: Literal["truncate", "mask"] = "truncate"
    """Clamp weights outside the bounds, or set them to 0."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Lower bound; none: unbounded."""
    high: Annotated[float, Field(gt=0)] | None = 3.0
    """Upper bound; none: unbounded."""
    normalise: bool = False
    """Divide the weights, after their bounds, by their mean over the step: over its tokens, or over its sequences."""
    max_nonfinite: Share = 0.01
    """Share of a step's rollout log-probs that may be NaN or infinite (their weight is 1) before the run ends."""


class Algorithm(Section):
    """The point in the space of GRPO variants."""

    recipe: str | None = None
    """Named combination (launch/configs/recipes) whose values apply where the file gives none; on the command line it
    replaces the file's whole algorithm section."""
    advantage: Choice = Choice(name="grpo")
    """Entry of the ADVANTAGES table."""
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several reward functions: weigh and sum, then normalise; or normalise each within its group first (GDPO)."""
    policy_loss: Choice = Choice(name="clip")
    """Entry of the POLICY_LOSSES table."""
    aggregation: Choice = Choice(name="sequence_mean")
    """Entry of the AGGREGATIONS table."""
    kl: Kl = Kl()
    """KL to the reference model."""
    reference_sync_steps: NonNegative = 0
    """Move the reference towards the policy every so many optimizer steps (between batches); 0: it stays frozen."""
    reference_sync_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy in the moved reference; 1 is a copy."""
    old_logprobs: Literal["auto", "current", "recompute", "rollout"] = "auto"
    """Proximal policy: the training pass itself (current), a pass before the first update (recompute), the engine's
    (rollout), or auto: current where that is exact, else recompute."""
    importance_sampling: ImportanceSampling = ImportanceSampling()
    """Correction for the gap between engine and learner log-probs."""
    rejection: Choice = Choice(name="none")
    """Policy term without the tokens or sequences whose engine and learner disagree too much: an entry of the REJECTIONS
    table. It leaves the importance weights of the others, and every denominator, as they are."""
    off_policy_threshold: Annotated[float, Field(gt=0)] | None = None
    """Drop the policy term of sequences with a negative advantage whose mean log-prob fell by more than this."""
    entropy: Choice = Choice(name="none")
    """Entropy bonus: none, bonus (coef), or adaptive (target, delta, lowest, highest)."""
    entropy_schedule: Choice = Choice(name="constant")
    """Factor on the coefficient of the entropy bonus: an entry of the SCHEDULES table."""
    top_entropy_quantile: Share = 1.0
    """Policy term on this share of the step's tokens alone, those with the highest entropy."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: train, leave out of the step, or replace by fresh groups."""
    max_resampled_groups: Positive = 1000
    """Groups replaced per step under resample; beyond them the step runs with what there is."""
    mask_truncated: bool = False
    """Take completions that hit max_new_tokens out of the loss (their reward still counts)."""
    truncation_penalty: Annotated[float, Field(le=1)] | None = None
    """Reward of a completion that hit max_new_tokens: times this from 0 to 1, or exactly this when negative."""
    barren_limit: Positive = 1000
    """Groups without signal in a row that end the run."""
