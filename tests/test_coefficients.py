"""Coefficients that a run steers: the KL controller and the entropy bonuses."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest

from learner.coefficients import ENTROPY_BONUSES, KL_CONTROLS, AdaptiveBonus, AdaptiveKl

NAN, INF = float("nan"), float("inf")


# --- KL ---


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 0.98), (2.0, 0.98), (3.2, 0.98), (3.6, 0.99), (4.0, 1), (4.4, 1.01), (4.8, 1.02), (400.0, 1.02), (-9, 0.98)],
)
def test_the_error_is_relative_and_limited_to_a_fifth(kl, factor, unit):
    control = AdaptiveKl(0.5, target=4.0, horizon=1000.0, unit=unit)
    control.observe(*((kl, 77.0) if unit == "sequence" else (77.0, kl)), 100)
    assert control.value == pytest.approx(0.5 * factor)
    assert control.skipped == 0


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("kl", [NAN, INF, -INF])
def test_a_kl_that_is_not_finite_changes_nothing_and_is_counted(kl, unit):
    control = AdaptiveKl(0.5, target=4.0, unit=unit)
    control.observe(kl, kl, 100)
    assert (control.value, control.skipped) == (0.5, 1)
    control.observe(*((1.0, kl) if unit == "sequence" else (kl, 1.0)), 100)
    assert control.value == pytest.approx(0.5 * (1 - 0.2 * 100 / 10000))
    assert control.skipped == 1


def test_the_horizon_counts_sequences():
    one, many = (AdaptiveKl(1.0, target=1.0, horizon=1e6) for _ in range(2))
    one.observe(2.0, 0.0, 1000)
    for _ in range(1000):
        many.observe(2.0, 0.0, 1)
    assert one.value == pytest.approx(1.0002, abs=1e-9)
    assert many.value == pytest.approx(math.exp(0.0002), abs=1e-9)


def test_a_fixed_coefficient_stays():
    control = KL_CONTROLS["fixed"](0.3)
    control.observe(100.0, 100.0, 10**6)
    assert control.value == 0.3


# --- entropy ---


@pytest.mark.parametrize(("name", "args", "value"), [("none", {}, 0.0), ("bonus", {"coef": 0.01}, 0.01)])
@pytest.mark.parametrize("entropy", [0.0, 5.0, NAN])
def test_a_fixed_bonus_stays(name, args, value, entropy):
    bonus = ENTROPY_BONUSES[name](**args)
    assert bonus.value == value
    bonus.observe(entropy)
    assert bonus.value == value


def test_the_adaptive_bonus_by_hand():
    bonus = AdaptiveBonus(target=0.2, delta=0.1, highest=0.25)
    assert bonus.value == 0  # Nothing is known yet.
    # (entropy of the step, coefficient after it, what applies in the next step)
    for entropy, coef, value in [
        (0.2, 0.1, 0.1),  # The target itself is low enough.
        (0.1, 0.2, 0.2),
        (0.0, 0.25, 0.25),
        (0.3, 0.15, 0),  # Above the target nothing is added, while the coefficient falls.
        (0.1, 0.25, 0.25),
        (0.3, 0.15, 0),
        (0.3, 0.05, 0),
        (0.3, 0, 0),
        (0.3, 0, 0),
    ]:
        bonus.observe(entropy)
        assert (bonus.coef, bonus.value) == pytest.approx((coef, value), abs=1e-12)


def test_the_adaptive_bonus_has_the_defaults_of_the_maths_and_starts_at_its_lowest():
    bonus = AdaptiveBonus()
    assert (bonus.target, bonus.delta, bonus.lowest, bonus.highest) == (0.2, 0.005, 0.0, 1.0)
    assert bonus.last_entropy == INF
    assert (AdaptiveBonus(lowest=0.1).coef, AdaptiveBonus(lowest=0.1).value) == (0.1, 0)
    bonus = AdaptiveBonus(lowest=0.1)
    bonus.observe(5.0)
    assert bonus.coef == 0.1


def test_the_fields_are_all_the_state():
    first = AdaptiveBonus(delta=0.1)
    first.observe(0.1)
    again = AdaptiveBonus(delta=0.1)
    for field in dataclasses.fields(first):
        setattr(again, field.name, getattr(first, field.name))
    assert again.value == first.value == pytest.approx(0.1)
    control = AdaptiveKl(0.1, target=1.0)
    control.observe(2.0, 0.0, 10)
    other = AdaptiveKl(9.0, target=1.0)
    vars(other).update(copy.deepcopy(vars(control)))
    for one in (control, other):
        one.observe(3.0, 0.0, 10)
    assert other.value == control.value
