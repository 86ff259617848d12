"""The reward doctor: every finding provoked by a small function, the verb's exit codes, and the probe before a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch import doctor, run
from launch.doctor import examine
from launch.doctor_rules import rank_correlation
from launch.doctor_samples import sweep
from launch.preflight import prepare
from rollout import sandbox
from shared.errors import InputErrors
from tests.fakes import fake_ray, make_config, make_prompt, write_config, write_model, write_rows

pytestmark = pytest.mark.process
has_wall = pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox here: {sandbox.sandbox_problem()}")
CODE = """
import os, random, subprocess, time
def distance(completions): return [abs(20 - len(c)) / 100 for c in completions]
def closeness(completions): return [1 / (1 + abs(20 - len(c))) for c in completions]
def far(completions): return [min(abs(20 - len(c)), 99) / 99 for c in completions]
def constant(completions): return [1.0] * len(completions)
def messages(completions): return [float(len([c])) for c in completions]
def form(completions): return [float(c.startswith("<<") and c.endswith(">>")) for c in completions]
def schema(completions): return [float(whole_answer(c)) for c in completions]
def whole_answer(text):
    import json
    try: value = json.loads(text)
    except ValueError: return False
    return isinstance(value, dict) and set(value) == {"answer"} and type(value["answer"]) is int
def never(completions): return [None] * len(completions)
def unrelated(completions): return [len(c) * 5 % 7 / 7 for c in completions]
def brief(completions): return [1 / (1 + len(c.strip())) for c in completions]
def cliff(completions): return [(len(c) >= 32) + min(len(c), 99) / 9999 for c in completions]
def huge(completions): return [min(len(c), 9) * 500.0 for c in completions]
def moody(completions): return [random.random() for _ in completions]
def ranks(completions): return [float(i) for i in range(len(completions))]
def centred(completions):
    mean = sum(min(len(c), 99) for c in completions) / len(completions)
    return [min(len(c), 99) - mean for c in completions]
def rude(completions, answer):
    completions.sort(); answer[0] = None
    return [float(len(c) % 7) for c in completions]
def wrong_best(completions, answer): return [float(a not in c) for c, a in zip(completions, answer)]
def right(completions, answer): return [float(a in c) for c, a in zip(completions, answer)]
def coloured(completions): raise ValueError("\\x1b[31mred")
def raises(completions):
    if any("{" in c for c in completions): raise ValueError("unbalanced")
    return [0.0] * len(completions)
def crashes(completions):
    if "" in completions: os.kill(os.getpid(), 11)
    return [0.0] * len(completions)
def short(completions): return [0.0]
def text(completions): return ["0.5"] * len(completions)
def nan(completions): return [float("nan") if not c else 0.0 for c in completions]
def big(completions): return [10.0 ** len(c) if len(c) < 99 else 0.0 for c in completions]
def hangs(completions): time.sleep(99)
def slow(completions):
    time.sleep(0.004 * len(completions))
    return [len(c) % 7 / 7 for c in completions]
def evaluates(completions): return [float(number(c)) for c in completions]
def number(text):
    try: return len(str(eval(text, {}))) % 7
    except Exception: return 0
def runs_block(completions):
    for c in completions:
        try: exec(c.partition("```python")[2].partition("```")[0], {})
        except Exception: pass
    return [len(c) % 7 / 7 for c in completions]
def shells(completions):
    for c in completions:
        if "touch" in c: subprocess.run(c, shell=True, capture_output=True)
    return [len(c) % 7 / 7 for c in completions]
"""
CODES = {"wrong reward count": "E302", "bad reward value": "E303", "reward raised": "E304", "reward too slow": "E305"}
PROMPTS = [make_prompt(i, answer=str(41 + i)) for i in range(2)]
TARGET = {"kind": "target_length", "value": 20}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "r.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def see(code):
    """``see(name, **fields)``: the doctor's verdict on one function of the file."""

    def verdict(name: str, changes: dict | None = None, **fields):
        source = name if name.startswith("length") else f"{code}:{name}"
        changes = {"reward.functions": [{"function": source, **fields}]} | (changes or {})
        return examine(make_config(**changes), PROMPTS)[0]

    return verdict


def findings(verdict) -> list[tuple[str, str]]:
    return [(finding.level, finding.rule) for finding in verdict.findings]


@pytest.mark.parametrize(
    ("name", "fields", "level", "rule", "said"),
    [
        ("constant", {}, "warning", "constant", "is 1 on all"),
        ("messages", {}, "warning", "constant", "is completion a message list?"),
        ("never", {}, "warning", "always None", "no number on"),
        ("distance", {"objective": TARGET}, "error", "reversed", "approach 20 characters: it will be maximised in"),
        ("distance", {}, "warning", "reversed?", "is lowest at 2"),
        ("closeness", {"objective": {"kind": "longer"}}, "error", "reversed", "completions get longer"),
        ("brief", {"objective": {"kind": "longer"}}, "error", "reversed", "Did you mean -abs(...)?"),
        ("unrelated", {"objective": TARGET}, "warning", "unrelated", "rank correlation"),
        ("brief", {}, "warning", "best when empty", "an empty completion gets the best value, 1"),
        ("cliff", {}, "warning", "jump", "at 31 characters, "),
        ("huge", {}, "warning", "huge", "reaches 4500"),
        ("length", {"args": {"sign": -1}}, "warning", "huge", "reaches -2"),
        ("moody", {}, "warning", "not repeatable", "gives another value when called again"),
        ("ranks", {}, "warning", "depends on company", "when the batch is permuted"),
        ("rude", {}, "warning", "changes its input", "they are copies"),
        ("wrong_best", {}, "error", "gold not best", "gives the right answer 0 and a wrong one 1"),
        ("raises", {}, "error", "reward raised", "ValueError: unbalanced on the gold completion '\\\\boxed{41}'"),
        ("crashes", {}, "error", "reward raised", "signal 11 on the empty completion ''"),
        ("short", {}, "error", "wrong reward count", "1 values"),
        ("text", {}, "error", "bad reward value", "str '0.5'"),
        ("nan", {}, "error", "bad reward value", "nan for ''"),
        ("big", {}, "error", "bad reward value", "(overflows float32)"),
        ("hangs", {"timeout_s": 0.2}, "error", "reward too slow", "> 0.2 s"),
        ("evaluates", {}, "error", "executes text", "a canary made a file"),
        ("runs_block", {}, "error", "executes text", "a canary made a file"),
        ("shells", {}, "error", "executes text", "a canary made a file"),
    ],
)  # fmt: skip
def test_a_finding_is_made_and_shown(see, name, fields, level, rule, said):
    verdict = see(name, **fields)
    found = [finding for finding in verdict.findings if finding.rule == rule]
    assert [finding.level for finding in found] == [level], findings(verdict)
    assert said in found[0].text
    assert found[0].code == CODES.get(rule, "E320" if level == "error" else "")
    assert f"  {level}: {rule}: {found[0].text}" in verdict.render()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("closeness", {"objective": TARGET, "accept": ["jump"]}),
        ("right", {}),
        ("right", {"objective": {"kind": "match"}}),
        ("schema", {}),
        ("length_exponential", {"args": {"target": 20}, "objective": TARGET}),
        ("length_exponential", {"args": {"target": 20}}),
        pytest.param("evaluates", {"isolation": "sandbox"}, marks=has_wall),
    ],
)
def test_a_sound_function_is_ok(see, name, fields):
    verdict = see(name, **fields)
    assert findings(verdict) == []
    assert f"{name}: ok  min " in verdict.render()


def test_a_value_that_depends_on_the_mean_of_the_batch_depends_on_company(see):
    assert ("warning", "depends on company") in findings(see("centred"))


def test_a_function_named_after_length_gets_a_table_to_confirm(see):
    shown = see("length", args={"sign": 0.01}).render()
    assert "reward by length (higher is better; is that the direction you want?): 1:0.01" in shown
    assert "reward by length" not in see("length", args={"sign": 0.01}, objective={"kind": "longer"}).render()


def test_slow_functions_are_told_by_their_deadline_and_by_the_step(see):
    verdict = see("slow", {"rollout.group_size": 200}, timeout_s=2.0)
    assert any("a group of 200 takes" in f.text for f in verdict.findings if f.rule == "slow"), verdict.render()
    verdict = see("slow", {"rollout.group_size": 100, "learner.prompts_per_step": 50})
    (text,) = [f.text for f in verdict.findings if f.rule == "slow"]
    assert "scoring a step takes about 2" in text
    assert "with 1 workers" in text


def test_accepted_findings_are_silent_but_errors_are_not(see):
    assert findings(see("brief", accept=["best when empty"])) == []
    assert ("error", "gold not best") in findings(see("wrong_best", accept=["gold not best", "best when empty"]))


def test_always_none_can_be_accepted(see):
    assert findings(see("never", accept=["always None"])) == []


def test_a_function_whose_spread_is_a_hundredth_of_anothers_has_no_say(code):
    def scales(weight):
        functions = [{"function": f"{code}:huge", "weight": weight}, {"function": f"{code}:right"}]
        verdicts = examine(make_config(**{"reward.functions": functions}), PROMPTS)
        return [f.text for f in verdicts[1].findings if f.rule == "unequal scale"]

    assert "consider normalize_then_sum" in scales(1.0)[0]
    assert scales(0.001) == []


@pytest.mark.parametrize(
    ("a", "b", "value"), [([1, 2, 3], [10, 20, 21], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3, 4], [1, 1, 2, 2], 0.8944), ([1, 2], [5, 5], 0)]
)  # fmt: skip
def test_rank_correlation_shares_the_rank_of_equal_values(a, b, value):
    assert rank_correlation(np.array(a), np.array(b)) == pytest.approx(value, abs=1e-4)


def test_the_sweep_goes_to_twice_the_target_in_single_steps_around_it():
    assert {16, 17, 18, 19, 20, 21, 22, 23, 24} <= set(sweep(20, small=False))
    assert (min(sweep(20, small=False)), max(sweep(20, small=False))) == (1, 40)
    assert len(sweep(20, small=True)) < len(sweep(20, small=False))


# --- the verb, and the probe before a run ---


@pytest.fixture
def config(tmp_path, monkeypatch, code):
    """``config(*functions) -> path`` of a configuration file with a model and rows, beside ``r.py``."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(code.read_text())
    model = write_model(tmp_path / "model")
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])

    def write(*functions: dict) -> str:
        changes = {"model.path": str(model), "data.train": str(train), "run.output_dir": str(tmp_path / "out")}
        return str(write_config(tmp_path / "run.toml", **changes, **{"reward.functions": [*functions]}))

    return write


@pytest.mark.parametrize(
    ("name", "code_", "said"),
    [
        ("right", 0, "advice: nothing found; the rewards look usable"),
        ("constant", 0, "advice: constant is 1 on all"),
        ("wrong_best", 2, "error: gold not best"),
        ("raises", 2, "error: reward raised: ValueError: unbalanced"),
        ("coloured", 2, r"error: reward raised: ValueError: \x1b[31mred"),
    ],
)
def test_the_exit_code_is_2_for_errors_alone(config, tmp_path, capsys, name, code_, said):
    output = tmp_path / "doctor.json"
    assert doctor.main([config({"function": f"r.py:{name}"}), "--output", str(output)]) == code_
    shown = capsys.readouterr()
    assert said in shown.out
    assert ("error[E" in shown.err) == (code_ == 2)
    assert "Traceback" not in shown.err
    assert not (tmp_path / "out").exists(), "a run folder of which there is no run"
    (entry,) = json.loads(output.read_text())
    assert (entry["name"], entry["isolation"]) == (name, "subprocess")
    assert bool(entry["samples"]) == (name not in ("raises", "coloured"))


def test_errors_name_the_function_in_the_file(config, capsys):
    assert doctor.main([config({"function": "r.py:right"}, {"function": "r.py:short"})]) == 2
    assert (
        "error[E302] wrong reward count — r.py:short, run.toml:reward.functions[1]. Found 1 values"
        in capsys.readouterr().err
    )


def test_own_completions_are_examined_too(config, tmp_path, capsys):
    function = config({"function": "r.py:raises"}, {"function": "r.py:closeness"})
    rows = write_rows(tmp_path / "mine.jsonl", [{"completion": "from an earlier run"}])
    doctor.main([function, "--completions", str(rows), "--output", str(tmp_path / "seen.json")])
    capsys.readouterr()
    _, entry = json.loads((tmp_path / "seen.json").read_text())
    assert [s["value"] for s in entry["samples"] if s["kind"] == "given"] == [0.5]


def test_completions_belong_to_the_row_of_their_prompt(config, tmp_path):
    given = [{"prompt": "3+1=", "completion": "4"}, {"prompt": "0+1=", "completion": "4"}, {"completion": "4"}]
    rows, seen = write_rows(tmp_path / "mine.jsonl", given), tmp_path / "seen.json"
    doctor.main([config({"function": "r.py:right"}), "--completions", str(rows), "--output", str(seen)])
    (entry,) = json.loads(seen.read_text())
    values = [(s["prompt"], s["value"]) for s in entry["samples"] if s["kind"] == "given"]
    assert sorted(values) == [(0, 0.0), (0, 0.0), (3, 1.0)]


def test_a_reward_that_wants_a_form_of_its_own_names_what_shows_it_one(config, tmp_path, capsys):
    function = config({"function": "r.py:form"})
    assert doctor.main([function]) == 0
    said = capsys.readouterr().out
    assert "is 0 on all" in said
    assert "show it some that do: millrace doctor with --completions FILE.jsonl or --sample 4" in said
    rows = write_rows(tmp_path / "mine.jsonl", [{"completion": "<<1>>"}])
    assert doctor.main([function, "--completions", str(rows)]) == 0
    assert "advice: nothing found; the rewards look usable" in capsys.readouterr().out
    rows = write_rows(tmp_path / "mine.jsonl", [{"completion": "1"}])
    doctor.main([function, "--completions", str(rows)])
    assert "the given ones too: nothing to learn" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "not json\n", '{"text": "a"}\n'], ids=["missing", "no JSON", "no column"])
def test_a_bad_file_of_completions_is_wrong_input(config, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    assert doctor.main([config({"function": "r.py:right"}), "--completions", str(tmp_path / "mine.jsonl")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "number"), [("raises", "E304"), ("short", "E302"), ("nan", "E303"), ("hangs", "E305"), ("wrong_best", "E320")]
)  # fmt: skip
def test_a_run_is_refused_before_any_actor_exists(config, monkeypatch, capsys, name, number):
    ray = fake_ray(monkeypatch)
    assert run.main([config({"function": f"r.py:{name}", "timeout_s": 0.5})]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"error[{number}] ")
    assert "run.toml:reward.functions[0]. Found " in line
    assert name in line
    assert dict(ray.calls) == {}


def test_the_probe_passes_warnings_on_and_can_be_left_out(config, tmp_path):
    from shared.config_loader import load_config

    constant = load_config([config({"function": "r.py:constant"})], {})
    assert any(
        "warning[W320] run.toml: reward constant: is 1" in w for w in prepare(constant, "run.toml", tmp_path).warnings
    )
    raising = load_config([config({"function": "r.py:raises"})], {})
    with pytest.raises(InputErrors, match="E304"):
        prepare(raising, "run.toml", tmp_path)
    assert prepare(raising, "run.toml", tmp_path, probing=False).train.prompts
