"""What a terminal shows of a run: every figure from the row, nothing that a narrow screen cannot hold."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from launch.display import BARS, Lines, Panel, clock, screen_for, sparkline, whereabouts
from tests.fakes import make_config

ROW = {
    "reward": 0.5,
    "kl": 0.0123,
    "entropy": 0.4,
    "advantages/abs_mean": 0.8,
    "grad_norm": 1.25,
    "completions/mean_length": 31.4,
    "completions/clipped_ratio": 0.02,
    "throughput/rollout_tokens_per_second": 4989.0,
    "throughput/train_tokens_per_second": 9800.0,
    "staleness/mean": 1.2,
    "buffer/ready": 12.0,
    "buffer/in_flight": 64.0,
    "engines/healthy": 2.0,
    "time/step": 0.5,
    "time/engine-0/generate": 0.9,
    "time/engine-0/wait_for_prompts": 0.1,
    "time/engine-1/generate": 0.7,
    "time/engine-1/wait_for_prompts": 0.3,
    "time/learner-0/wait_for_groups": 0.55,
    "time/learner-0/backward": 0.449,
    "time/learner-0/gather": 0.001,
}


def shown(panel: Panel, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(panel.render())
    return console.export_text()


@pytest.fixture
def panel():
    made = Panel(make_config(**{"run.steps": 40, "rollout.max_staleness": 2, "run.output_dir": "runs/mine"}))
    made._show = lambda: None
    for step in range(1, 21):
        made.step(step, ROW | {"reward": step / 20}, 61.0)
    made.evaluated(20, {"eval/reward": 0.75}, "best reward 0.75 at version 20")
    return made


def test_a_name_with_control_characters_moves_no_terminal(capsys):
    Lines(make_config()).evaluated(3, {"eval/rewards/a\x1b[2J/mean": 0.5}, "")
    assert "a\\x1b[2J 0.500" in capsys.readouterr().out


def test_the_panel_says_how_it_learns_how_fast_and_who_waits(panel):
    text = shown(panel)
    for piece in ("mine  step 20/40", "1.000", "0.750", "best reward 0.75 at version 20", "kl 0.0123", "4,989", "9,800",
                  "1.20 of at most 2", "12 ready, 64 in flight", "2 serve", "1:01 left", "cut off 2%"):  # fmt: skip
        assert piece in text, piece
    assert re.search(r"2 engines +generate 80%  wait for prompts 20%", text)
    assert "wait for groups 55%  backward 45%" in text  # What is next to nothing is left out.


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal(panel, width):
    assert max(map(len, shown(panel, width).splitlines())) <= width


def test_a_run_that_stands_still_is_seen_to(panel, monkeypatch):
    assert "no step for" not in shown(panel)
    monkeypatch.setattr("launch.display.time.monotonic", lambda: panel._stepped + 75)
    assert "no step for 1:15" in shown(panel)


def test_text_of_a_run_is_no_markup():
    made = Panel(make_config(**{"run.output_dir": "runs/[red]x"}))
    made._show = lambda: None
    made.step(1, ROW, 0.0)
    assert "[red]x" in shown(made)


def test_a_panel_on_a_live_terminal_draws_and_ends():
    out = io.StringIO()
    made = Panel(make_config(), Console(file=out, force_terminal=True, width=80))
    made.step(1, ROW, 1.0)
    made.close()
    made.close()
    assert "reward" in out.getvalue()


def test_what_is_no_number_is_left_out_of_the_curves():
    """A step whose rewards are all None, or an evaluation without one."""
    made = Panel(make_config(**{"run.steps": 9}))
    made._show = lambda: None
    made.step(1, ROW | {"reward": math.nan}, math.nan)
    made.evaluated(1, {"eval/reward": math.nan}, "")
    text = shown(made)
    assert "? left" in text
    assert "held-out" not in text
    for step, reward in ((2, 0.25), (3, math.inf), (4, 0.5)):
        made.step(step, ROW | {"reward": reward}, 1.0)
    made.evaluated(4, {"eval/reward": 0.75}, "")
    text = shown(made)
    assert f"0.500  {BARS[0]}{BARS[-1]}" in text
    assert f"0.750  {BARS[0]}" in text


def test_states_of_a_kind_of_process_are_one_line():
    assert list(whereabouts(ROW)) == ["2 engines", "learner"]
    assert whereabouts({"time/step": 1.0}) == {}
    row = {f"time/{name}/score": 1.0 for name in ("reward-0", "reward-1", "learner-0", "engine-0", "controller")}
    assert list(whereabouts(row)) == ["controller", "engine", "learner", "2 scorers"]


def test_a_process_that_did_not_report_stays_in_its_place(panel):
    panel.step(21, {"reward": 1.0, "time/learner-0/backward": 1.0}, 1.0)
    text = shown(panel)
    assert "generate 80%" in text
    assert "backward 100%" in text


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [([], 5, ""), ([1.0], 5, BARS[0]), ([0.0, 1.0], 5, BARS[0] + BARS[-1]), ([0, 0, 7, 7], 2, BARS[0] + BARS[-1]),
     ([2, 2, 2], 3, BARS[0] * 3), (list(range(8)), 8, BARS)],
)  # fmt: skip
def test_a_sparkline_spans_lowest_to_highest(values, width, expected):
    assert sparkline(values, width) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.6, "1:00:00"), (3725, "1:02:05"), (math.nan, "?")]
)
def test_the_clock(seconds, text):
    assert clock(seconds) == text


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    assert isinstance(screen_for(make_config()), Lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screen_for(make_config()), Panel)
    monkeypatch.setenv("MILLRACE_PLAIN", "1")
    assert isinstance(screen_for(make_config()), Lines)


def test_an_evaluation_is_a_line_with_its_headlines(capsys):
    row = {"eval/rewards/accuracy/mean": 0.25, "eval/mean_length": 3.0, "eval/sampled/reward": 0.2, "eval/pass@4": 0.5}
    Lines(make_config()).evaluated(7, row, "best reward 0.25 at version 7")
    said = "evaluation at version 7: accuracy 0.250  pass@4 0.500  (best reward 0.25 at version 7)\n"
    assert capsys.readouterr().out == said
