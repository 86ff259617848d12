"""Where a run begins, what is refused, what is cut; and a controller that goes on from any checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import replaced
from launch.builtin import TASKS, make_tokenizer
from launch.controller import Controller
from launch.resume import Point, check_lock, dated, find, rewind_rows, take_lock
from launch.run_folder import RunFolder
from launch.stored_groups import read_groups, write_groups
from rollout.prompts import PromptSet, PromptStream
from shared import checkpoints
from shared.config_data import Source
from shared.errors import InputError, InputErrors
from shared.metrics import read_metrics
from shared.types import Completion, RolloutGroup, VersionSpan
from tests.fakes import (
    FakeEngines,
    FakeLearners,
    FakeRecorder,
    FakeRewards,
    make_config,
    make_group,
    make_prompt,
    write_model,
    write_rows,
)

METRICS = {"reward": 0.5, "advantages/abs_mean": 1.0, "throughput/rollout_tokens_per_second": 1234.5}


def stream_of(count: int = 7, seed: int = 0) -> PromptStream:
    return PromptStream([make_prompt(i) for i in range(count)], seed)


STATE = {
    "version": 3,
    "cursor": 9,
    "data": stream_of().digest,
    "evaluated": 0,
    "buffer": {"barren": 0, "resampled": 0, "empty": []},
    "again": [],
    "stopping": {},
    "failures": {},
}


@pytest.fixture
def place(tmp_path):
    """``place(**changes) -> (configuration, folder)``, with a model on disk."""
    write_model(tmp_path / "model")
    return lambda **changes: (make_config(**{"model.path": str(tmp_path / "model")} | changes), tmp_path / "out")


def lived(config, folder, version=3, queued=()):
    """A run folder whose run was killed some steps after its checkpoint of ``version``."""
    run = RunFolder(config, folder)
    for group in range(12):
        run.samples.admit(group)
        run.samples.sampled(group, 2, 6)
        if group < 6:
            run.samples.close(group, "trained", step=1 + group // 2)
    for step in range(1, version + 1):
        run.step(step, METRICS, [make_group()])
    state = STATE | {"version": version, "samples": run.samples.mark()}
    asyncio.run(run.commit(run.draft(version), state, list(queued)))
    for step in range(version + 1, version + 3):
        run.step(step, METRICS, [make_group()])
    run.samples.close(6, "trained", step=version + 1)
    run.samples.flush()
    run.book.close()
    run._metrics.close()
    run._lock.close()
    return run


def refusal(config, folder, stream=None):
    with pytest.raises((InputError, InputErrors)) as excinfo:
        find(config, folder, stream or stream_of(), "run.toml")
    problems = getattr(excinfo.value, "problems", [excinfo.value])
    return [(p.code, p.place) for p in problems], str(excinfo.value)


# --- where a run begins ---


def test_a_new_folder_begins_anew(place):
    config, folder = place()
    assert find(config, folder, stream_of(), "run.toml") is None
    folder.mkdir()
    assert find(config, folder, stream_of(), "run.toml") is None


def test_going_on_from_the_newest_checkpoint_is_the_default(place, capsys):
    config, folder = place()
    group = make_group(7, version=2)
    lived(config, folder, queued=[group])
    point = find(config, folder, stream_of(), "run.toml")
    assert (point.version, point.place) == (3, folder / "checkpoints" / "step-000003")
    (again,) = point.queued(config, stream_of())
    assert again.group_id == 7
    assert again.prompt.prompt_id == stream_of().at(7).prompt_id
    capsys.readouterr()
    run = RunFolder(config, folder)
    run.rewind(point)
    said = capsys.readouterr().out
    assert f"going on from {point.place}\ncut: 2 recorded rows and the fates of 1 groups after it" in said
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    assert [row["step"] for row in map(json.loads, (folder / "metrics.cut.jsonl").read_text().splitlines())] == [4, 5]
    assert sorted(run.samples.open) == list(range(6, 12))
    run.finish()


def test_overwriting_and_refusing_are_choices(place):
    config, folder = place()
    lived(config, folder)
    assert find(place(**{"run.resume": "overwrite"})[0], folder, stream_of(), "run.toml") is None
    codes, text = refusal(place(**{"run.resume": "never"})[0], folder)
    assert codes == [("E602", f"run.output_dir = {folder}")]
    assert "Found 5 recorded rows" in text


def test_a_run_without_any_checkpoint_begins_anew_and_says_so(place, capsys):
    config, folder = place()
    run = lived(config, folder)
    run_checkpoint = folder / "checkpoints" / "step-000003"
    for path in sorted(run_checkpoint.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run_checkpoint.rmdir()
    assert find(config, folder, stream_of(), "run.toml") is None
    assert "warning[W603] no checkpoint in" in capsys.readouterr().out
    again = RunFolder(config, folder)
    again.rewind(None)
    assert read_metrics(folder) == []
    assert len((folder / "metrics.cut.jsonl").read_text().splitlines()) == 5
    assert again.samples.open == {}
    again.finish()
    assert run.path == folder


def test_a_step_that_is_asked_for_is_taken_or_refused(place):
    config, folder = place()
    lived(config, folder)
    assert find(place(**{"run.resume": "3"})[0], folder, stream_of(), "run.toml").version == 3
    assert refusal(place(**{"run.resume": "2"})[0], folder)[0] == [("E603", str(folder / "checkpoints"))]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"run.seed": 5}, "run.seed"),
        ({"data.shuffle": False}, "data.shuffle"),
        ({"rollout.group_size": 6}, "rollout.group_size"),
    ],
)
def test_a_configuration_that_cannot_go_on_is_e605(place, changes, key):
    config, folder = place()
    lived(config, folder)
    codes, text = refusal(place(**changes)[0], folder)
    assert codes == [("E605", f"run.toml:{key}")]
    assert "restore it, or start a new run" in text


def test_other_data_and_another_model_are_e605_together(place, tmp_path):
    config, folder = place()
    lived(config, folder)
    write_model(tmp_path / "other", hidden_size=128)
    codes, _ = refusal(place(**{"model.path": str(tmp_path / "other")})[0], folder, stream_of(8))
    assert codes == [("E605", "run.toml:data.train"), ("E605", "run.toml:model.path")]


def days_of(monkeypatch, day: str) -> None:
    monkeypatch.setattr("launch.resume.today", lambda: date.fromisoformat(day))


def test_on_another_day_a_run_has_the_prompts_of_its_first(place, tmp_path, monkeypatch):
    """The template of an earlier report: its prompts, and so their digest, changed at midnight."""
    tokenizer = make_tokenizer(TASKS["gsm8k"])
    tokenizer.chat_template = 'Today is {{ strftime_now("%d %b %Y") }}. {{ messages[0].content }}'
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": f"Q{i}"}]} for i in range(3)])

    def prompts(config):
        return PromptSet.load(config, [Source(path=str(rows))], "train", "run.toml:data.train", tokenizer)

    config, folder = place(**{"rollout.max_prompt_tokens": 99})
    days_of(monkeypatch, "2026-11-28")
    first = dated(config, folder)
    RunFolder(first, folder).finish()
    days_of(monkeypatch, "2026-11-29")
    second = dated(config, folder)
    assert (first.data.date, second.data.date) == ("2026-11-28", "2026-11-28")
    one, two = prompts(first), prompts(second)
    assert tokenizer.decode(one.prompts[0].token_ids.tolist()) == "Today is 28 Nov 2026. Q0"
    assert [p.token_ids.tolist() for p in one.prompts] == [p.token_ids.tolist() for p in two.prompts]
    assert one.stream(first).digest == two.stream(second).digest
    other = dated(place(**{"rollout.max_prompt_tokens": 99, "run.resume": "overwrite"})[0], folder)
    assert other.data.date == "2026-11-29"
    assert prompts(other).stream(other).digest != one.stream(first).digest


def test_a_day_that_is_set_is_kept_and_a_new_run_has_todays(place, monkeypatch):
    config, folder = place()
    days_of(monkeypatch, "2026-11-30")
    assert dated(config, folder).data.date == "2026-11-30"
    assert dated(place(**{"data.date": "2026-01-02"})[0], folder).data.date == "2026-01-02"
    folder.mkdir()
    for text in ("", "[data]\n", "not toml"):
        (folder / "config.toml").write_text(text)
        assert dated(config, folder).data.date == "2026-11-30"


def test_what_may_change_may_change(place):
    config, folder = place()
    lived(config, folder)
    changes = {"learner.lr": 1e-3, "run.steps": 999, "learner.num_ranks": 4, "rollout.num_engines": 3}
    assert find(place(**changes)[0], folder, stream_of(), "run.toml").version == 3


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"learner.lr": 1e-3, "learner.num_ranks": 2, "run.steps": 7}, True),
        ({"rollout.max_staleness": 0}, False),
        ({"learner.prompts_per_step": 1}, False),
        ({"rollout.temperature": 0.5}, False),
        ({"reward.functions": [{"function": "length"}]}, False),
    ],
)
def test_waiting_groups_that_another_configuration_would_make_otherwise_are_made_again(place, changes, same):
    config, folder = place()
    lived(config, folder, queued=[make_group(7, version=2)])
    now = place(**changes)[0]
    assert (find(now, folder, stream_of(), "run.toml").queued(now, stream_of()) is not None) == same


def test_going_back_sets_the_later_checkpoints_aside(place, capsys):
    """Else the newest would be one of a way that the run has left."""
    config, folder = place()
    lived(config, folder, version=5)
    older, newer = folder / "checkpoints" / "step-000003", folder / "checkpoints" / "step-000005"
    shutil.copytree(newer, older)
    now = place(**{"run.resume": "3"})[0]
    run = RunFolder(now, folder)
    state = json.loads((older / "state" / "run.json").read_text()) | {"version": 3}
    run.rewind(Point(older, {}, state))
    assert "set aside: cut.step-000005 in" in capsys.readouterr().out
    assert [path.name for path in checkpoints.all_of(folder / "checkpoints")] == ["step-000003"]
    assert (folder / "checkpoints" / "cut.step-000005" / "MANIFEST.json").exists()
    run.finish()


def test_overwriting_removes_what_runs_write_and_nothing_else(place):
    config, folder = place(**{"run.resume": "overwrite"})
    (folder / "other-run" / "checkpoints").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (folder / "checkpoints").symlink_to(elsewhere)
    (folder / "metrics.jsonl").write_text("{}\n")
    run = RunFolder(config, folder)
    replaced.remove(folder)
    run.replaced = ""
    run.finish()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "other-run" / "checkpoints").is_dir()
    assert (elsewhere / "kept").exists()
    assert read_metrics(folder) == []


# --- what is cut ---


def test_rows_after_the_version_are_cut_with_their_samples(place):
    config, folder = place(**{"run.samples_every": 1})
    lived(config, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # The writer was killed in the middle of a line.
    assert rewind_rows(folder / "metrics.jsonl", 3) == 3
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    point = find(config, folder, stream_of(), "run.toml")
    run = RunFolder(config, folder)
    run.rewind(point)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"step-00000{i}.parquet" for i in (1, 2, 3)]
    assert [json.loads(line)["step"] for line in (folder / "ledger" / "weights.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    run.finish()


def test_nothing_to_cut_is_no_file(place):
    config, folder = place()
    lived(config, folder)
    assert rewind_rows(folder / "metrics.jsonl", 99) == 0
    assert not (folder / "metrics.cut.jsonl").exists()


# --- one writer ---


def test_a_live_run_locks_its_folder(place):
    config, folder = place()
    run = RunFolder(config, folder)
    for attempt in (lambda: find(config, folder, stream_of(), "run.toml"), lambda: RunFolder(config, folder)):
        with pytest.raises(InputError) as excinfo:
            attempt()
        assert (excinfo.value.code, excinfo.value.what) == ("E602", "run is live")
        assert f"pid {os.getpid()} on " in excinfo.value.found
    run.finish()
    check_lock(folder)
    take_lock(folder).close()


# --- checkpoints of the folder ---


def test_checkpoints_are_kept_by_number_and_by_score(place):
    config, folder = place(**{"run.keep_checkpoints": 2})
    run = RunFolder(config, folder)
    for version in range(1, 7):
        state = STATE | {"version": version, "stopping": {"best_version": 2}, "samples": run.samples.mark()}
        asyncio.run(run.commit(run.draft(version), state, []))
    kept = [path.name for path in checkpoints.all_of(folder / "checkpoints")]
    assert kept == ["step-000006", "step-000005", "step-000002"]
    run.finish()


def test_a_full_disk_costs_one_checkpoint_and_the_second_in_a_row_the_run(place, monkeypatch, capsys):
    config, folder = place()
    run = RunFolder(config, folder)
    state = STATE | {"samples": run.samples.mark()}
    asyncio.run(run.commit(run.draft(3), state, []))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.checkpoints._sync", full)
    asyncio.run(run.commit(run.draft(4), state | {"version": 4}, []))
    said = capsys.readouterr().out
    assert (
        f"warning[W601] checkpoint not written — run.output_dir = {folder}. Found step 4: [Errno 28] No space" in said
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"]
    with pytest.raises(InputError) as excinfo:
        asyncio.run(run.commit(run.draft(5), state | {"version": 5}, []))
    assert excinfo.value.code == "E601"
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="the last one took"):
        run.draft(6)
    run.finish()


# --- groups on disk ---


def test_a_stored_group_is_the_same_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)

    def completion(tokens):
        ids = rng.integers(0, 150_000, tokens).astype(np.int32)
        logprobs = np.float32(-10 * rng.random(tokens))
        logprobs[:1] = np.nan
        spans = (VersionSpan(3, 0, tokens // 2), VersionSpan(4, tokens // 2, tokens)) if tokens else ()
        return Completion(ids, logprobs, f"text {tokens} ü", "length", spans)

    def group(group_id):
        rewards = np.array([0.1, np.nan, 1 / 3], np.float32)
        parts = {"a/b": rewards, "c": np.float32([1, 2, np.nan])}
        completions = tuple(completion(n) for n in (0, 1, 9))
        return RolloutGroup(
            group_id, make_prompt(group_id), completions, rewards, parts, {"note": list("xyz")}, {"m": 0.5}
        )

    groups = [group(7), group(3)]
    write_groups(tmp_path / "g.parquet", groups)
    for before, after in zip(groups, read_groups(tmp_path / "g.parquet", make_prompt), strict=True):
        assert (after.group_id, after.extra, after.metrics) == (before.group_id, before.extra, before.metrics)
        assert after.prompt.text == before.prompt.text
        np.testing.assert_array_equal(after.rewards, before.rewards)
        assert list(after.reward_parts) == list(before.reward_parts)
        for name, values in before.reward_parts.items():
            np.testing.assert_array_equal(after.reward_parts[name], values)
        for one, other in zip(before.completions, after.completions, strict=True):
            assert (one.token_ids.dtype, one.logprobs.dtype) == (other.token_ids.dtype, other.logprobs.dtype)
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
            assert (one.text, one.finish_reason, one.version_spans) == (
                other.text,
                other.finish_reason,
                other.version_spans,
            )


# --- the loop goes on ---


class Lives:
    """One run over several lives, each cut off in its middle, with fakes and random timing."""

    def __init__(self, folder, seed, **changes):
        self.folder, self.chance = folder, np.random.default_rng(seed)
        settings = {
            "run.steps": 12,
            "run.checkpoint_every": 2,
            "run.stall_timeout_s": 5.0,
            "reward.max_failed_share": 1.0,
        }
        self.config = make_config(**settings | changes)
        self.checkpoint = None
        self.lineage: list[tuple[int, list[int]]] = []
        """(Version before, group ids) of the steps that count."""

    async def live(self, seconds):
        """One life; True if it came to its end."""
        engines = FakeEngines(delay=lambda _: self.chance.random() * 0.003, receive_delay=0.001)
        rewards = FakeRewards(
            barren=lambda group: group % 5 == 3,
        )
        learners, recorder = FakeLearners(delay=0.001), FakeRecorder(self.folder)
        controller = Controller(self.config, stream_of(), [], engines, rewards, learners, recorder)
        if self.checkpoint is None:
            recorder.samples.rewind({"bytes": 0, "sha256": EMPTY, "counts": {}, "reasons": {}, "open": []})
            self.lineage = []
        else:
            state, queued = self.checkpoint
            recorder.samples.rewind(state["samples"])
            learners.version = engines.version = state["version"]
            controller.restore(state, queued)
            self.lineage = [step for step in self.lineage if step[0] < state["version"]]
        begin = learners.version
        task = asyncio.ensure_future(controller.run())
        await asyncio.wait({task}, timeout=seconds)
        ended = task.done()
        if not ended:
            before = len(recorder.commits)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self.chance.random() < 0.5:  # Killed: what an interrupt saves was not.
                del recorder.commits[before:]
        else:
            task.result()
        self.lineage += [(begin + i, ids) for i, ids in enumerate(learners.trained)]
        assert max(learners.staleness, default=0) <= self.config.rollout.max_staleness
        if recorder.commits:
            _, state, queued = recorder.commits[-1]
            self.checkpoint = state, queued
        self.samples = recorder.samples
        return ended


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


async def test_with_another_batch_size_every_waiting_group_is_made_again_within_its_bound(tmp_path):
    """Those of the old configuration may be too old, or too many at once, for the new one."""
    lives = Lives(tmp_path, 3, **{"rollout.max_staleness": 3, "learner.prompts_per_step": 4, "run.steps": 8})
    for _ in range(50):
        if lives.checkpoint or await lives.live(0.02):
            break
    state, _ = lives.checkpoint
    config = make_config(**{"rollout.max_staleness": 1, "learner.prompts_per_step": 1, "run.steps": 20})
    recorder, learners, engines = FakeRecorder(tmp_path), FakeLearners(), FakeEngines()
    controller = Controller(config, stream_of(), [], engines, FakeRewards(), learners, recorder)
    recorder.samples.rewind(state["samples"])
    again = sorted(recorder.samples.open)
    learners.version = engines.version = state["version"]
    controller.restore(state, None)
    # Cut off at once, and once more: what is still to be made again is no burst then either.
    state = json.loads(json.dumps(controller._state()))
    assert state["again"] == again
    controller = Controller(config, stream_of(), [], engines, FakeRewards(), learners, recorder)
    controller.restore(state, [])
    assert controller.buffer.in_flight == 0
    await asyncio.wait_for(controller.run(), 5)
    assert max(learners.staleness) <= 1
    assert learners.order[: len(again)] == again[: len(learners.order)]
    assert learners.order == sorted(set(learners.order))


@settings(derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    staleness=st.integers(0, 3),
    mode=st.sampled_from(["keep", "resample"]),
    cap=st.sampled_from([1, 100]),
)
def test_over_any_lives_every_group_is_trained_at_most_once_and_none_is_skipped(
    tmp_path_factory, seed, staleness, mode, cap
):
    changes = {
        "rollout.max_staleness": staleness,
        "algorithm.zero_variance": mode,
        "algorithm.max_resampled_groups": cap,
    }
    lives = Lives(tmp_path_factory.mktemp("lives"), seed, **changes)

    async def run():
        for _ in range(200):
            if await lives.live(0.005 + lives.chance.random() * 0.04):
                return
        raise AssertionError("the run never ended")

    asyncio.run(run())
    trained = [group for _, ids in lives.lineage for group in ids]
    assert [version for version, _ in lives.lineage] == list(range(12))
    assert trained == sorted(set(trained))  # Once each, in admission order, over all lives.
    lives.samples.flush()
    rows = [json.loads(line) for line in (lives.folder / "samples.jsonl").read_text().splitlines()]
    assert sorted(row["group"] for row in rows if row["fate"] == "trained") == trained
    known = {row["group"] for row in rows} | set(lives.samples.open)
    assert known == set(range(len(known)))  # No row of any epoch was left out.
    if mode == "keep":
        assert trained == list(range(24))


def test_a_lock_that_may_not_be_opened_is_one_line(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "lock").write_text("")
    monkeypatch.setattr("launch.resume.take_lock", denied)
    with pytest.raises(InputError, match=r"E601.*Permission denied"):
        check_lock(tmp_path)
