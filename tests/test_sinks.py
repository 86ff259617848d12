"""Metrics beside metrics.jsonl: chosen by name, fed every row, and never the end of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from launch.run_folder import RunFolder
from launch.sinks import SINKS, Sinks, check_sinks, prometheus_name
from shared.errors import InputError
from tests.fakes import make_config, make_group
from tests.pace import scaled

ROW = {"reward": 0.5, "time/engine-0/generate": 2.0, "eval/pass@4": 0.25}
GRAFANA = Path(__file__).parent.parent / "launch" / "grafana.json"


class Recorder:
    """A sink of one's own."""

    made: list[Recorder]

    def __init__(self, folder, config, *, colour="grey", broken=""):
        self.colour, self.broken, self.rows, self.closed = colour, broken, [], False
        Recorder.made.append(self)

    def write(self, step, row):
        if self.broken == "write":
            raise OSError("no\nroute")
        self.rows.append((step, row))

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    Recorder.made = []
    monkeypatch.setitem(SINKS, "recorder", Recorder)


def test_every_step_and_evaluation_goes_to_every_sink(tmp_path):
    sinks = ["recorder", {"name": "recorder", "colour": "red"}]
    folder = RunFolder(make_config(**{"run.sinks": sinks, "run.steps": 1}), tmp_path / "out")
    row = ROW | {"advantages/abs_mean": 1.0, "throughput/rollout_tokens_per_second": 9.0}
    folder.step(1, row, [make_group()])
    folder.evaluated(1, {"eval/reward": 0.5})
    folder.close()
    assert [sink.colour for sink in Recorder.made] == ["grey", "red"]
    assert Recorder.made[1].rows == [(1, row), (1, {"eval/reward": 0.5})]
    assert Recorder.made[1].closed


def test_a_sink_that_fails_is_switched_off_and_costs_nothing_else(tmp_path, capsys):
    config = make_config(**{"run.sinks": [{"name": "recorder", "broken": "write"}, "recorder"]})
    sinks = Sinks(config, tmp_path)
    for step in (1, 2):
        sinks.write(step, ROW)
    assert [len(sink.rows) for sink in Recorder.made] == [0, 2]
    said = capsys.readouterr().out
    assert said == "warning[W905] sink recorder switched off — OSError: no route\n"


@pytest.mark.parametrize(
    ("sink", "code"),
    [("tensorbord", "E107"), ({"name": "recorder", "color": "red"}, "E107"), ("wandb", "E702")],
)
def test_a_sink_that_cannot_be_is_refused_before_the_start(monkeypatch, sink, code):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as excinfo:
        check_sinks(make_config(**{"run.sinks": [sink]}), "run.toml")
    assert excinfo.value.code == code
    assert "run.toml:run.sinks[0]" in excinfo.value.place


def test_tensorboard_writes_events(tmp_path):
    sinks = Sinks(make_config(**{"run.sinks": ["tensorboard"]}), tmp_path)
    sinks.write(1, ROW)
    sinks.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_a_tracker_bear_the_name_of_the_run_and_its_settings(tmp_path, monkeypatch, name):
    calls = []
    run = types.SimpleNamespace(
        log=lambda row, step=None: calls.append((step, row)),
        finish=lambda: calls.append("finish"),
        define_metric=lambda *_, **given: None,
    )
    module = types.SimpleNamespace(**vars(run), init=lambda **given: calls.append(given) or run)
    monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "mine").mkdir()
    sinks = Sinks(make_config(**{"run.sinks": [{"name": name, "project": "p", "tags": ["x"]}]}), tmp_path / "mine")
    sinks.write(3, {"reward": 0.5})
    sinks.close()
    given, (step, row), end = calls
    assert (given["project"], given["name"], given["tags"], given["resume"]) == ("p", "mine", ["x"], "allow")
    assert given["config"]["rollout"]["group_size"] == make_config().rollout.group_size
    assert (step, row, end) == (3 if name == "trackio" else None, {"step": 3, "reward": 0.5}, "finish")


class Tracked:
    """A run of W&B: its own step never falls, and rows below it are dropped."""

    def __init__(self):
        self.rows, self.axes, self._next = [], set(), 0

    def define_metric(self, name, step_metric):
        self.axes.add((name, step_metric))

    def log(self, row, step=None):
        step = self._next if step is None else step
        if step >= self._next:
            self.rows.append(row)
            self._next = step + 1

    def finish(self):
        pass


def test_a_run_of_wandb_goes_on_where_its_folder_does_and_nowhere_else(tmp_path, monkeypatch):
    runs = {}
    module = types.SimpleNamespace(init=lambda **given: runs.setdefault((given["project"], given["id"]), Tracked()))
    monkeypatch.setitem(sys.modules, "wandb", module)

    def told(path, *steps, **changes):
        folder = RunFolder(make_config(**{"run.sinks": ["wandb"]}, **changes), path)
        for step in steps:
            folder.evaluated(step, {"eval/reward": step / 10})
        folder.close()

    told(tmp_path / "a" / "mine", 1, 2, 3)
    told(tmp_path / "a" / "mine", 2, 3)  # Goes on from the checkpoint of step 1.
    told(tmp_path / "b" / "mine", 1)
    told(tmp_path / "a" / "mine", 1, **{"run.resume": "overwrite"})
    assert [[row["step"] for row in run.rows] for run in runs.values()] == [[1, 2, 3, 2, 3], [1], [1]]
    assert all(run.axes == {("*", "step")} for run in runs.values())


@pytest.fixture
def gauges(monkeypatch):
    """``{(name, tags): value}`` of what Ray would export."""
    found = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def set(self, value, tags):
            found[self.name, tuple(sorted(tags.items()))] = value

    monkeypatch.setitem(sys.modules, "ray.util.metrics", types.SimpleNamespace(Gauge=Gauge))
    return found


def test_prometheus_gauges(tmp_path, gauges):
    sinks = Sinks(make_config(**{"run.sinks": ["prometheus"]}), tmp_path / "mine")
    sinks.write(3, ROW)
    run = ("run", "mine")
    assert gauges == {
        ("millrace_step", (run,)): 3.0,
        ("millrace_reward", (run,)): 0.5,
        ("millrace_eval_pass_at_4", (run,)): 0.25,
        ("millrace_time_seconds", (("process", "engine-0"), run, ("state", "generate"))): 2.0,
    }


def test_the_dashboard_asks_for_metrics_that_there_are(run_metrics):
    board = json.loads(GRAFANA.read_text(encoding="utf-8"))
    asked = {target["expr"] for panel in board["panels"] for target in panel.get("targets", [])}
    assert len(asked) >= 12
    names = {prometheus_name(name) for name in run_metrics if not name.startswith("time/")}
    names |= {"millrace_time_seconds", "millrace_step"}
    for expression in asked:
        found = set(re.findall(r"\b(?:ray_)?(millrace_\w+)", expression))
        assert found, expression
        assert found <= names, (expression, found - names)


@pytest.fixture
def run_metrics():
    """Names of the metrics of a real run, kept beside the tests."""
    return json.loads((Path(__file__).parent / "data" / "metric_names.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.stack
def test_rays_own_exporter_tells_prometheus(tmp_path):
    """In a process of its own: Ray is started once a process."""
    code = """
import socket, sys, time, urllib.request
import ray
from launch.sinks import Sinks
from tests.fakes import make_config
from pathlib import Path
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=1, include_dashboard=True, _metrics_export_port=port, logging_level="error")
sinks = Sinks(make_config(**{"run.sinks": ["prometheus"]}), Path("mine"))
until = time.monotonic() + 120
while time.monotonic() < until:
    sinks.write(3, {"reward": 0.5, "time/engine-0/generate": 2.0})
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=15).read().decode()
    except OSError:
        text = ""
    found = [line for line in text.splitlines() if line.startswith("ray_millrace")]
    if len(found) >= 3:
        break
    time.sleep(1)
print("\\n".join(found))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=scaled(150), check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ray_millrace")]
    assert any(
        line.startswith("ray_millrace_reward{") and 'run="mine"' in line and line.endswith(" 0.5") for line in lines
    ), done
    assert any("ray_millrace_time_seconds{" in line and 'state="generate"' in line for line in lines)
