"""The simulator: virtual time, an engine's arithmetic by hand, whole runs, and a control plane that stays flat."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from launch import simulate, virtual_time
from launch.simulated_engine import SimulatedEngine
from launch.sinks import SINKS
from launch.timings import Timings
from rollout.engine import Sampling
from shared.errors import InputError
from shared.weights import Canary, Publication
from tests.fakes import make_config, write_config
from tests.pace import scaled

PROMPT = np.zeros(10, np.int32)
PLAIN = Timings(
    decode_step_s=0.01, decode_sequence_s=0.001, prefill_token_s=0.0, request_s=0.0, prepare_s=1.0, pause_s=0.5
)


def test_hours_pass_in_no_time():
    async def wait():
        begun = time.monotonic()
        await asyncio.gather(asyncio.sleep(7200), asyncio.sleep(3600))
        assert await asyncio.to_thread(lambda: 3) == 3
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.Event().wait()
        return time.monotonic() - begun

    real = time.process_time()
    assert virtual_time.run(wait()) == pytest.approx(7260)
    assert time.process_time() - real < scaled(1)
    assert time.monotonic() > 0
    assert abs(time.monotonic() - time.clock_gettime(time.CLOCK_MONOTONIC)) < 1


def ended(timings, *requests, room=1000, at=()):
    """Virtual seconds at which each request, sent at ``at``, had its answer."""

    async def run():
        engine = SimulatedEngine(timings, make_config(**{"rollout.vllm": {"max_num_seqs": room}}), 0)

        async def one(lengths, delay):
            await asyncio.sleep(delay)
            engine._timings = replace(engine._timings, lengths=tuple(lengths))
            engine._rng = SimpleNamespace(choice=lambda values, count: np.asarray(values)[:count])
            answer = asyncio.ensure_future(engine.generate(PROMPT, Sampling(len(lengths), 99, 1.0), 0))
            assert [len(c.token_ids) for c in await answer] == list(lengths)
            return time.monotonic()

        delays = at or (0,) * len(requests)
        return await asyncio.gather(*(one(lengths, delay) for lengths, delay in zip(requests, delays)))

    return virtual_time.run(run())


def test_an_engine_decodes_in_lock_step():
    # Two sequences: 10 tokens at 12 ms together, then 20 more at 11 ms.
    assert ended(PLAIN, (10, 30)) == pytest.approx([10 * 0.012 + 20 * 0.011])
    # Another joins after 0.06 s, when five tokens are done.
    both = 5 * 0.012 + 5 * 0.013 + 0.012 * 15
    assert ended(PLAIN, (10, 30), (20,), at=(0, 0.06)) == pytest.approx([both + 5 * 0.011, both])


def test_what_has_no_room_waits():
    # One place: 5 tokens, then 10.
    assert ended(PLAIN, (5, 10), room=1) == pytest.approx([15 * 0.011])


def test_prompts_take_their_time():
    timings = replace(PLAIN, prefill_token_s=0.01, request_s=0.2)
    assert ended(timings, (10,)) == pytest.approx([0.2 + 10 * 0.01 + 10 * 0.011])


def test_nothing_is_decoded_in_a_pause():
    async def run():
        engine = SimulatedEngine(replace(PLAIN, mean_length=1.0, longest=1), make_config(), 0)
        engine._timings = replace(PLAIN, lengths=(200,))
        answer = asyncio.ensure_future(engine.generate(PROMPT, Sampling(1, 999, 1.0), 0))
        await asyncio.sleep(0)
        await engine.receive(Publication(7, "x", "", (), "", Canary(PROMPT, np.zeros(9, np.float32))))
        (completion,) = await answer
        return time.monotonic(), [(s.version, s.start, s.end) for s in completion.version_spans]

    assert virtual_time.run(run()) == (pytest.approx(200 * 0.011 + 0.5), [(-1, 0, 100), (7, 100, 200)])


def quiet(capsys, *arguments):
    assert simulate.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_of_many_engines_keeps_the_books(capsys):
    result = quiet(capsys, "--engines", "30", "--steps", "6")
    assert result["engines"] == 30
    assert result["completions_per_s"] > 2000
    assert result["staleness_max"] <= 1
    assert 0.5 < result["simulated_engine_busy"] <= 1


def test_the_same_seed_gives_the_same_run(capsys):
    first, second = (quiet(capsys, "--engines", "5", "--steps", "3") for _ in range(2))
    keys = [key for key in first if key.startswith(("simulated", "staleness"))]
    assert [first[key] for key in keys] == [second[key] for key in keys]


def test_timings_come_from_a_file(tmp_path, capsys):
    file = tmp_path / "timings.json"
    Timings().save(file)
    assert Timings.load(file) == Timings()
    slow = replace(Timings(), decode_step_s=1.0)
    slow.save(file)
    result = quiet(capsys, "--engines", "2", "--steps", "4", "--timings", str(file))
    assert result["simulated_step_s"] > 30


def test_no_tracker_is_told_of_a_simulation(tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setitem(SINKS, "wandb", lambda folder, config: told.append(folder))
    file = write_config(tmp_path / "my.toml", **{"run.sinks": ["wandb"]})
    quiet(capsys, str(file), "--steps", "2")
    assert told == []


@pytest.mark.parametrize(
    ("content", "code", "found"),
    [
        ('{"decode_step": 1}', "E101", "decode_step_s"),
        ('{"decode_step_s": -1}', "E102", "-1"),
        ('{"lengths": 3}', "E102", "3"),
        ("[", "E105", "Expecting value"),
    ],
)
def test_bad_timings(tmp_path, content, code, found):
    file = tmp_path / "timings.json"
    file.write_text(content)
    with pytest.raises(InputError, match=found) as excinfo:
        Timings.load(file)
    assert excinfo.value.code == code


@pytest.mark.parametrize("arguments", [["--engines", "0"], ["--engines", "x"], ["--enginess", "3"]])
def test_bad_options(arguments, capsys):
    assert simulate.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error[E10")


@pytest.mark.slow
def test_the_cost_of_a_group_does_not_grow_with_the_fleet(capsys):
    """With its margin for a noisy machine; ``millrace simulate`` itself measures 1.1 to 1.2 from 10 to 1,000."""
    costs = {10: [], 300: []}
    for _ in range(2):
        for engines, steps in ((10, "90"), (300, "5")):
            costs[engines].append(quiet(capsys, "--engines", str(engines), "--steps", steps)["controller_us_per_group"])
    assert min(costs[300]) < 1.6 * min(costs[10])


def test_a_group_is_done_in_time_while_another_waits_for_room():
    # Two places: 5 and 30 tokens, then 5 beside the 30, then the other group's 4.
    first = 14 * 0.012 + 16 * 0.011
    assert ended(PLAIN, (5, 30, 5), (4,), room=2, at=(0, 0.01)) == pytest.approx([first, 14 * 0.012])


def test_who_goes_away_leaves_an_engine_to_the_others():
    async def run():
        engine = SimulatedEngine(replace(PLAIN, lengths=(10,)), make_config(), 0)
        gone = engine.call("generate", PROMPT, Sampling(1, 99, 1.0), 0)
        await asyncio.sleep(0.01)
        engine._timings = replace(PLAIN, lengths=(30,))
        stays = engine.call("generate", PROMPT, Sampling(1, 99, 1.0), 0)
        await asyncio.sleep(0.01)
        gone.abort()
        async with asyncio.timeout(60):
            (completion,) = await stays.answer
        return len(completion.token_ids)

    assert virtual_time.run(run()) == 30
