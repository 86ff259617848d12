"""``millrace report``: what is read from a run folder, what is left out and told, and that nothing becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from launch.replaced import OURS
from launch.report.data import run_data
from launch.report.page import build, embedded, main, render
from launch.report.rows import MAX_POINTS, read_rows, rounded, series, times
from launch.report.samples import read_samples
from launch.report.times import BINS, MAX_INTERVALS, in_order, read_trace, timeline
from launch.stored_groups import write_groups
from shared.errors import InputError
from shared.types import Completion, RolloutGroup
from tests.fakes import make_group
from tests.report_runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def write_bare(folder, config="[run]\nsteps = 3\n", rows=()):
    """A run folder of this configuration, which may fit no version, and these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


# --- the verb ---


def test_the_page_lies_in_the_first_run_folder(run, capsys):
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "report.html" in OURS
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert [one["name"] for one in data_of(page)["runs"]] == ["first"]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_the_page_lies_where_it_is_asked_for(run, tmp_path):
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: None, "error[E603] not a run folder"),
        (lambda run: (run.mkdir(), (run / "metrics.jsonl").write_text("")), "no config.toml with metrics.jsonl"),
        (
            lambda run: (run.mkdir(), (run / "config.toml").touch(), (run / "metrics.jsonl").write_text("{}\n{\n")),
            "error[E606] cannot read metrics",
        ),
        (
            lambda run: (run.mkdir(), (run / "config.toml").touch(), (run / "metrics.jsonl").write_bytes(b"\xff\n")),
            "error[E606] cannot read metrics",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, spoil, said):
    spoil(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0]
    assert len(lines) == 2
    assert lines[1] == "exit code 2"


def test_a_place_that_cannot_be_written_is_refused(run, tmp_path, capsys):
    assert main([str(run), "--output", str(tmp_path / "none" / "page.html")]) == 2
    assert "error[E601] cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("output", [".", "pages"])
def test_a_folder_is_no_place_for_the_page(run, tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages").mkdir()
    assert main([str(run), "--output", output]) == 2
    said = capsys.readouterr().err
    assert "error[E601] cannot write" in said
    assert str(Path(output) / "report.html") in said
    assert [path.name for path in tmp_path.rglob("*")] == ["pages"]


def test_a_page_that_cannot_be_put_in_its_place_leaves_no_draft(tmp_path, capsys):
    folder = write_bare(tmp_path)
    (folder / "report.html").mkdir()
    assert main([str(folder)]) == 2
    assert "error[E601] cannot write the report" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "metrics.jsonl", "report.html"]


def test_too_many_runs_are_refused(run):
    with pytest.raises(InputError, match="at most 8"):
        build([run] * 9)


# --- the page ---


def test_the_page_stands_alone(run):
    page = build([run])
    assert (
        re.findall(
            r"""(?:src|href)=["']?(?!#)[^"'\s>]+|url\(|@import|https?://(?!www\.w3\.org)""", page.split('id="data"')[0]
        )
        == []
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    script = re.search(r"</script>\n<script>(.*)</script>\n</body>", page, re.S).group(1)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "fetch("):
        assert danger not in script


@pytest.mark.parametrize(
    "text", ["</script><img src=x onerror=alert(1)>", "<!--<script>", "{{SCRIPT}}", "\u2028&amp;", "]]>"]
)
def test_no_text_of_a_run_becomes_markup(text):
    page = render({"made": text, "runs": []})
    assert data_of(page)["made"] == text
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert re.findall("[<>&]", embedded(text)) == []


def test_a_lone_surrogate_does_not_stop_the_page():
    assert json.loads(embedded("a\ud800b")) == "a?b"


def test_runs_of_the_same_name_are_told_apart(run, tmp_path):
    other = write_run(tmp_path / "first", steps=4, samples_every=0)
    names = [one["name"] for one in data_of(build([run, other]))["runs"]]
    assert names == [f"{run.parent.name}/first", f"{tmp_path.name}/first"]


# --- rows ---


def test_a_row_that_is_being_written_is_left_out(run, tmp_path):
    (tmp_path / "config.toml").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert read_rows(tmp_path) == [{"step": 1, "reward": 0.5}]


def test_series_are_as_long_as_the_steps_and_constants_are_kept_once():
    rows = [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "b": 2.0, "c": None}, {"step": 4, "a": 0.123456789, "b": 2.0}]
    notes = []
    assert series(rows, notes) == {"steps": [1, 2, 4], "values": {"a": [1, None, 0.12346], "b": [2]}}
    assert notes == []


def test_long_series_become_means_and_the_page_says_so():
    rows = [{"step": i + 1, "a": float(i % 2)} for i in range(2 * MAX_POINTS)]
    notes = []
    thin = series(rows, notes)
    assert len(thin["steps"]) == MAX_POINTS
    assert thin["steps"][-1] == 2 * MAX_POINTS
    assert thin["values"]["a"] == [0.5]
    assert notes == ["Curves: every point is the mean of 2 steps (3,000 were recorded)."]


def test_seconds_are_those_of_the_rows_however_far_apart_and_thinned():
    spaced = [{"step": 4 * (i + 1), "time/step": 2.0} for i in range(3)]
    assert series(spaced, [])["seconds"] == [2, 4, 6]
    thin = series([{"step": i + 1, "time/step": i % 2} for i in range(2 * MAX_POINTS)], [])
    assert thin["seconds"] == list(range(1, MAX_POINTS + 1))


def test_many_metrics_and_runs_make_the_series_shorter():
    rows = [{"step": i + 1, "constant": 1.0} | {f"m{j}": i + j / 7 for j in range(400)} for i in range(1000)]
    assert len(series(rows, [])["steps"]) == 500
    assert len(series(rows, [], runs=4)["steps"]) == 200


def test_the_times_of_many_processes_are_added_up_by_kind():
    row = {f"time/engine-{i}/generate": 1.0 for i in range(20)} | {"step": 1, "time/step": 3.0}
    notes = []
    assert series([row], notes)["values"] == {"time/step": [3], "time/engines/generate": [20]}
    assert "20 processes" in notes[0]
    assert times([row, row])["engine-3"] == {"generate": 2.0}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1240.0, 1240),
        (0.123456789, 0.12346),
        (244469.0, 244469),
        (1e-9, 1e-9),
        (float("nan"), None),
        (True, None),
        ("x", None),
    ],
)
def test_numbers_are_rounded_and_what_is_none_is_none(value, kept):
    assert rounded(value) == kept


# --- time ---


def test_processes_come_by_kind_and_number():
    named = ["reward-0", "engine-10", "engine-2", "controller", "learner-0", "reward-0.1", "odd"]
    assert in_order(named) == ["controller", "engine-2", "engine-10", "learner-0", "reward-0", "reward-0.1", "odd"]


def test_the_timeline_covers_the_run_and_its_end_exactly(run):
    trace = read_trace(run / "ledger" / "trace.json")
    shown = timeline(trace, notes := [])
    assert list(shown["bins"]) == ["controller", "engine-0", "learner-0", "reward-0"]
    for runs in shown["bins"].values():
        assert sum(runs[1::2]) == BINS
    kept = shown["window"]["engine-0"]
    assert shown["window_from"] == 0
    assert notes == []
    begin, end, _ = trace.lanes["engine-0"].arrays()
    assert kept[1::3] == pytest.approx(begin * 1e3, abs=0.1)
    assert kept[2::3] == pytest.approx((end - begin) * 1e3, abs=0.11)


def test_the_dominant_state_of_a_stretch_is_the_one_with_most_time(tmp_path):
    events = [{"name": "thread_name", "ph": "M", "args": {"name": "engine-0"}, "tid": 0}]
    events += [
        {"name": name, "ph": "X", "ts": ts, "dur": dur, "tid": 0}
        for name, ts, dur in [("a", 0, 300_000_000), ("b", 300_000_000, 600_000), ("c", 300_600_000, 299_400_000)]
    ]
    path = tmp_path / "trace.json"
    path.write_text("[\n" + "".join(json.dumps(event) + ",\n" for event in events) + '{"name": "cut o')
    assert timeline(read_trace(path), [])["bins"] == {"engine-0": [0, 300, 1, 1, 2, 299]}


def test_of_a_long_trace_the_newest_intervals_are_kept(tmp_path):
    write_run(tmp_path / "run", steps=200, samples_every=0, pieces=20)
    notes = []
    shown = timeline(read_trace(tmp_path / "run" / "ledger" / "trace.json"), notes)
    assert sum(len(flat) // 3 for flat in shown["window"].values()) == pytest.approx(MAX_INTERVALS, abs=4)
    assert "are kept exactly" in notes[0]
    assert all(value >= 0 for flat in shown["window"].values() for value in flat)


def test_no_trace_is_no_timeline(tmp_path):
    assert read_trace(tmp_path / "trace.json") is None
    (tmp_path / "trace.json").write_text("[\n")
    assert read_trace(tmp_path / "trace.json") is None


# --- the run ---


def test_a_finished_run_in_words(run):
    data = run_data(run)
    assert data["state"] == {"word": "finished", "text": "20 of 20 steps"}
    assert data["verdict"] == "The learner bounds this run."
    assert {"level", "title", "text", "change"} == set(data["findings"][0])
    assert {tile["label"] for tile in data["tiles"]} >= {"Reward", "Held-out reward", "Training time", "KL"}
    assert data["final"]["eval/reward"] == pytest.approx(0.8)
    assert "run.steps" in data["changed"]
    assert "run.seed" not in data["changed"]
    assert data["notes"] == []


def test_a_killed_run_gets_its_verdict_from_its_rows(tmp_path):
    data = run_data(write_run(tmp_path / "run", ended=False))
    assert data["state"]["word"] == "ended early"
    assert data["state"]["text"].startswith("10 of 20 steps")
    assert "raise" in data["verdict"]
    assert data["time"]["whole"] == {}
    assert set(data["time"]["training"]) == {"controller", "engine-0", "learner-0", "reward-0"}


def test_a_run_that_goes_on_says_so(tmp_path):
    folder = write_run(tmp_path / "run", ended=False)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_data(folder)["state"]["word"] == "going on"


def test_the_summary_of_an_earlier_life_is_not_taken(tmp_path):
    folder = write_run(tmp_path / "run")
    os.utime(folder / "ledger" / "time.json", (1, 1))  # The trace begins in 2001.
    data = run_data(folder)
    assert data["time"]["whole"] == {}
    assert data["verdict"] != "The learner bounds this run."


def test_the_summary_before_a_continuation_that_failed_to_start_is_not_taken(tmp_path):
    folder = write_run(tmp_path / "run")
    config, ledger = folder / "config.toml", folder / "ledger"
    os.utime(ledger / "time.json", (config.stat().st_mtime - 60,) * 2)
    config.write_text(config.read_text(encoding="utf-8").replace("steps = 20", "steps = 40"))
    (ledger / "trace.json").write_text("[\n")
    data = run_data(folder)
    assert data["state"]["word"] == "ended early"
    assert data["time"]["whole"] == {}


def test_rewards_are_named_as_their_metrics_are(tmp_path):
    config = """
        [[reward.functions]]
        function = "exact_match"
        weight = 1.0
        factory = false
        args = { name = "x" }
        [[reward.functions]]
        function = "mine.py:brevity"
        name = "short"
        [[reward.functions]]
        function = "mine.py:style"
        [[reward.functions]]
        model = "org/judge"
        [[reward.functions]]
        url = ["http://127.0.0.1:9000/score", "http://127.0.0.1:9001/score"]
        """
    facts = dict(run_data(write_bare(tmp_path, config))["facts"])
    assert facts["Rewards"] == "exact_match, short, style, judge, 127.0.0.1"


def test_where_a_batch_makes_several_steps_its_seconds_are_shared_among_them(tmp_path):
    rows = [{"step": step, "time/step": 2.0, "reward": 0.5} for step in (4, 8)]
    tiles = {tile["label"]: tile["note"] for tile in run_data(write_bare(tmp_path, rows=rows))["tiles"]}
    assert tiles["Training time"] == "0.5 s a step"


def test_means_at_the_end_tell_of_how_many_steps_they_are(tmp_path):
    few, one = ([{"step": i + 1, "reward": 0.5} for i in range(count)] for count in (4, 1))
    data = run_data(write_bare(tmp_path / "few", rows=few))
    assert data["tiles"][0]["note"] == "mean of the last 4 steps; first 0.5"
    assert data["final"]["averaged"] == 4
    assert run_data(write_bare(tmp_path / "one", rows=one))["tiles"][0]["note"] == "last step; first 0.5"


def test_a_setting_that_is_not_finite_is_written_out(tmp_path):
    config = "[algorithm]\nkl = { coef = inf }\npolicy_loss = { high = inf, low = nan }\n"
    settings = data_of(build([write_bare(tmp_path, config)]))["runs"][0]["settings"]
    assert settings == {f"algorithm.{name}": "inf" for name in ("kl.coef", "policy_loss.high")} | {
        "algorithm.policy_loss.low": "nan"
    }


def test_a_run_without_a_step_and_a_foreign_configuration_still_make_a_page(tmp_path):
    (tmp_path / "config.toml").write_text('[run]\nsteps = 3\nunheard_of = "<b>"\n')
    (tmp_path / "metrics.jsonl").touch()
    data = run_data(tmp_path)
    assert data["findings"] is None
    assert data["settings"] == {"run.steps": 3, "run.unheard_of": "<b>"}
    assert "does not fit this version" in data["notes"][0]
    assert "unheard_of" in build([tmp_path])


# --- completions ---


def test_tokens_spell_the_completion(run):
    samples = run_data(run)["samples"]
    assert samples["parts"] == ["answer", "format"]
    group = samples["groups"][0]
    assert (group["step"], len(group["completions"])) == (10, 8)
    first = group["completions"][0]
    text = "".join(samples["tokens"][place] for place in first["k"] if place not in samples["specials"])
    assert text.startswith("Answer 0: so ")
    assert "t" not in first
    assert len(first["k"]) == len(first["l"]) == first["n"]
    assert first["v"] == [8, 0, 20, 9, 20, 40]
    assert all(level >= 0 for level in first["l"])


def test_without_a_tokenizer_completions_are_plain_text(run):
    notes = []
    samples = read_samples(run, lambda: None, 10**6, notes)
    completion = samples["groups"][0]["completions"][0]
    assert completion["t"].startswith("Answer 0:")
    assert "k" not in completion
    assert "could not be loaded" in notes[0]


def piece(number):
    return f"<{number}>", number == 0


def test_a_completion_that_tokens_do_not_spell_keeps_its_text(tmp_path):
    write_groups(tmp_path / "samples" / "step-000001.parquet", [make_group()], 1)
    samples = read_samples(tmp_path, lambda: piece, 10**6, [])
    assert samples["groups"][0]["completions"][0] | {"v": 0} == {
        **{"f": "stop", "n": 3, "r": 0, "a": None, "p": [0], "k": [0, 1, 2], "l": [0, 0, 0], "v": 0, "t": "c0"}
    }
    assert samples["specials"] == [0]


def test_groups_beyond_the_budget_are_left_out_evenly(tmp_path):
    for step in (1, 2):
        groups = [make_group(10 * step + i, (i / 10, i / 10)) for i in range(9)]
        write_groups(tmp_path / "samples" / f"step-{step:06d}.parquet", groups, step)
    notes = []
    one = 120 + len("prompt 10") + 2 * (90 + 21)
    samples = read_samples(tmp_path, lambda: piece, 6 * one + 5, notes)
    assert [(group["step"], group["completions"][0]["r"]) for group in samples["groups"]] == [
        *((1, 0.1), (1, 0.4), (1, 0.7)),
        *((2, 0.1), (2, 0.4), (2, 0.7)),
    ]
    assert "6 of 18 stored groups" in notes[0]
    samples = read_samples(tmp_path, lambda: piece, one, [])
    assert [group["step"] for group in samples["groups"]] == [1]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (
            str([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]),
            "system: Be brief.\n\nuser: 2+2?",
        ),
        ("[{'role': 'user'", "[{'role': 'user'"),
        ("[{1: 2}]", "[{1: 2}]"),
        ("[{}, __import__('os')]", "[{}, __import__('os')]"),
        ("2+2=", "2+2="),
    ],
)
def test_a_prompt_of_messages_is_shown_as_a_conversation(tmp_path, stored, shown):
    group = make_group()
    group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, text=stored))
    write_groups(tmp_path / "samples" / "step-000001.parquet", [group], 1)
    assert read_samples(tmp_path, lambda: piece, 10**6, [])["groups"][0]["prompt"] == shown


def test_a_file_that_is_being_written_is_skipped(tmp_path):
    write_groups(tmp_path / "samples" / "step-000001.parquet", [make_group()], 1)
    (tmp_path / "samples" / "step-000002.parquet").write_bytes(b"PAR1 not yet")
    notes = []
    assert len(read_samples(tmp_path, lambda: piece, 10**6, notes)["groups"]) == 1
    assert "1 of 2 files could not be read" in notes[0]


def test_of_a_very_long_completion_the_middle_is_left_out(run, tmp_path):
    group = make_group()
    long = group.completions[0]
    long = Completion(np.zeros(5000, np.int32), np.full(5000, -np.inf, np.float32), "x", "length", long.version_spans)
    write_groups(
        tmp_path / "samples" / "step-000001.parquet", [RolloutGroup(0, group.prompt, (long,), group.rewards[:1])], 1
    )
    notes = []
    kept = read_samples(tmp_path, lambda: piece, 10**6, notes)["groups"][0]["completions"][0]
    assert (len(kept["k"]), kept["cut"], kept["n"]) == (1200, [800, 3800], 5000)
    assert set(kept["l"]) == {None}
    assert "the middle is left out" in notes[0]


# --- size ---


@pytest.mark.slow
def test_a_thousand_steps_of_eight_processes_fit_into_five_megabytes(tmp_path):
    folder = write_run(tmp_path / "run", 1000, 10, 200, engines=5, groups=8, pieces=10)
    page = build([folder])
    assert 1_000_000 < len(page.encode()) < 5_000_000
    data = data_of(page)["runs"][0]
    assert len(data["training"]["steps"]) == 1000
    assert len(data["time"]["timeline"]["bins"]) == 8
    assert {group["step"] for group in data["samples"]["groups"]} == set(range(10, 1001, 10))
    assert any("stored groups" in note for note in data["notes"])
