"""The data contract: staleness, signal, frozen fields."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from shared.types import RolloutGroup, StepReport, VersionSpan
from tests.fakes import make_completion, make_group, make_prompt

NAN = float("nan")


def test_a_completion_is_as_old_as_its_oldest_token():
    assert make_completion(tokens=4, spans=((3, 0, 2), (2, 2, 3), (5, 3, 4))).oldest_version == 2
    assert make_completion(tokens=0).oldest_version is None


def group_of(*spans: tuple) -> RolloutGroup:
    completions = tuple(make_completion(tokens=3 if s else 0, spans=s) for s in spans)
    return RolloutGroup(0, make_prompt(), completions, np.zeros(len(spans), np.float32))


@pytest.mark.parametrize(
    ("spans", "version", "staleness"),
    [
        ([((4, 0, 3),), ((4, 0, 3),)], 4, 0),
        ([((4, 0, 3),), ((3, 0, 1), (4, 1, 3))], 5, 2),
        ([(), ((4, 0, 3),)], 5, 1),
        ([(), ()], 9, 0),
    ],
)
def test_a_group_is_as_stale_as_its_oldest_token(spans, version, staleness):
    assert group_of(*spans).staleness(version) == staleness


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ((0.0, 1.0), True),
        ((0.1,) * 7, False),
        ((0.1, np.nextafter(np.float32(0.1), np.float32(1))), True),
        ((1.0, NAN), False),
        ((1.0, NAN, 1.0), False),
        ((1.0, NAN, 2.0), True),
        ((NAN, NAN), False),
        ((3.0,), False),
        ((0.0, -0.0), False),
    ],
)
def test_a_signal_is_any_exact_difference_between_two_valid_rewards(rewards, signal):
    assert make_group(0, rewards).has_signal() is signal


@pytest.mark.parametrize("value", [make_prompt(), make_completion(), make_group(), StepReport(1, True)])
def test_the_contract_is_frozen_and_travels(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 9)
    again = pickle.loads(pickle.dumps(value))
    assert np.array_equal(getattr(again, name), getattr(value, name))


def test_a_span_names_its_version_and_a_half_open_range():
    span = VersionSpan(2, 0, 5)
    assert (span.version, span.start, span.end) == (2, 0, 5)


def test_a_report_labels_the_groups_that_trained():
    groups = [make_group(3), make_group(4)]
    first, second = StepReport(1, True, {}, {3: [1.5, -1.5]}).label(groups)
    assert first.advantages.tolist() == [1.5, -1.5]
    assert first.rewards is groups[0].rewards
    assert second is groups[1]
