"""Bad input: every row answers with its code, its place and exit code 2, without a traceback or a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from launch import cli, plan, run, simulate
from tests.bad_input import ROWS, answering, fake_cluster, forbid_cluster, write_run
from tests.fakes import qwen2_shapes, write_config, write_model, write_rows, write_safetensors, write_tensors
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
FORM = re.compile(r"error\[E\d{3}\] [^.]+? — (?P<place>.+?)\. Found .+, expected .+\. Fix: .+")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    forbid_cluster(monkeypatch)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    return write_run(tmp_path, monkeypatch)


@pytest.fixture
def answer(place, capsys):
    return answering(place, capsys)


def refused(result: tuple[int, str, str], code: str, where: str) -> None:
    """Exit code 2 and exactly one error, of the one form, with ``code`` at ``where``."""
    exit_code, _, err = result
    assert "Traceback" not in err
    *lines, last = [line for line in err.splitlines() if not line.startswith("  ")]  # Without the table.
    assert (exit_code, last) == (2, "exit code 2")
    assert [FORM.fullmatch(line) is not None for line in lines] == [True], lines
    assert lines[0].startswith(f"error[{code}] ")
    assert where in FORM.fullmatch(lines[0])["place"]


def function(name: str, **fields) -> dict:
    return {"reward.functions": [{"function": name, **fields}]}


CONFIG = [
    ("E101", "run.toml:rollout.group_sise", {"rollout.group_sise": 4}),
    ("E102", "run.toml:learner.lr", {"learner.lr": "abc"}),
    ("E108", "run.toml:rollout.cpu_cores", {"rollout.num_engines": 3, "rollout.cpu_cores": "0|1"}),
    ("E405", "run.toml:model.dtype", {"model.dtype": "float16"}),
    ("E103", "run.toml:rollout.group_size", {"rollout.group_size": 1}),
    ("E104", "run.toml:learner.prompts_per_step", {"learner.num_ranks": 3}),
    ("E107", "algorithm.policy_loss.name", {"algorithm.policy_loss": {"name": "clipp"}}),
    ("E107", "algorithm.policy_loss.lwo", {"algorithm.policy_loss": {"name": "clip", "lwo": 1}}),
    ("E107", "algorithm.advantage.name", {"algorithm.advantage": {"name": "my.module:f"}}),
    ("E107", "algorithm.aggregation.name", {"algorithm.aggregation": {"name": "mean"}}),
    ("E107", "algorithm.kl.estimator", {"algorithm.kl": {"estimator": "k9"}}),
    ("E107", "learner.schedule.name", {"learner.schedule": {"name": "step"}}),
    ("E108", "run.toml:rollout.top_p", {"rollout.top_p": 0.9}),
    ("E108", "run.toml:learner.max_tokens_per_microbatch", {"learner.max_tokens_per_microbatch": 10}),
    ("E504", "run.toml:rollout.kv_cache_gib", {"rollout.kv_cache_gib": 0.5}),
    ("E504", "run.toml:rollout.kv_cache_gib", {"rollout.kv_cache_gib": 0}),
    ("E201", "run.toml:data.train", {"data.train": "openai/gsm8k"}),
    ("E201", "run.toml:data.train", {"data.train": "trian.jsonl"}),
    ("E201", "run.toml:data.eval", {"data.eval": "eval.jsonl"}),
    ("E201", "data.train", {"data.train": "builtin:additon"}),
    ("E309", "run.toml:data.train.path", {"data.train": "reasoning-gym:spiral_matrix"}),
    ("E108", "run.toml:data.train.args", {"data.train": {"path": "train.jsonl", "args": {"size": 3}}}),
    ("E202", "train.jsonl:question", {"data.prompt_column": "question"}),
    ("E203", "train.jsonl", {"learner.prompts_per_step": 5}),
    ("E208", "train.jsonl:1", {"rollout.max_prompt_tokens": 3}),
    ("E301", "run.toml:reward.functions[0]", function("exact_mach")),
    ("E301", "run.toml:reward.functions[0]", function("no_such_module:f")),
    ("E301", "run.toml:reward.functions[0]", function("nothing.py:score")),
    ("E301", "run.toml:reward.functions[0]", function("rewards.py:plane")),
    ("E301", "run.toml:reward.functions[0]", function("rewards.py:__name__")),
    ("E301", "run.toml:reward.functions[0].args", function("rewards.py:plain", args={"goal": 1})),
    ("E301", "run.toml:reward.functions[0]", function("regex")),
    ("E301", "run.toml:reward.functions[0]", function("exact_match", args={"column": "solution"})),
    ("E301", "run.toml:reward.functions[0]", {"reward.functions": [{"function": "exact_match"}] * 2}),
    ("E401", "run.toml:model.path", {"model.path": "models/nope"}),
    ("E401", "run.toml:model.path", {"model.path": "."}),
    ("E401", "model.path", {"model.path": "builtin:additon"}),
    ("E403", "model.tokenizer", {"data.chat": True}),
    ("E406", "run.toml:rollout.tensor_parallel_size", {"rollout.tensor_parallel_size": 3}),
    ("E407", "run.toml:rollout.max_new_tokens", {"rollout.max_new_tokens": 49}),
]


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["start", "dry-run"])
@pytest.mark.parametrize(("code", "where", "changes"), CONFIG)
def test_a_wrong_setting(answer, code, where, changes, flags):
    refused(answer(*flags, **changes), code, where)


def test_every_setting_is_named_with_its_file(answer):
    rows = [(code, where, changes) for code, where, changes in CONFIG if ":" not in where and ".jsonl" not in where]
    places = {(code, where): FORM.search(answer(**changes)[2])["place"] for code, where, changes in rows}
    assert {row: place for row, place in places.items() if place != f"run.toml:{row[1]}"} == {}


@pytest.mark.parametrize(
    ("code", "where", "arguments"),
    [
        ("E106", "command line:--rollout.num_engine", ["--rollout.num_engine", "2"]),
        ("E106", "command line:--rollout.num_engine", ["--rollout.num-engine=2"]),
        ("E106", "command line:--learner.lr", ["--learner.lr", "fast"]),
        ("E106", "command line:--learner.lr", ["--learner.lr"]),
        ("E106", "command line:--learner.lr", ["--learner.lr", "--run.steps", "2"]),
        ("E106", "command line:--resume", ["--resume", "auto"]),
    ],
)
def test_a_wrong_override(answer, code, where, arguments):
    refused(answer(*arguments), code, where)


@pytest.mark.parametrize(
    ("content", "where"),
    [(None, "missing.toml"), (b"[learner]\nlr = ", "missing.toml"), (b'a = "\xe9"', "missing.toml")],
)
def test_an_unreadable_configuration(place, capsys, content, where):
    if content is not None:
        (place / "missing.toml").write_bytes(content)
    refused((run.main([str(place / "missing.toml")]), *capsys.readouterr()), "E105", where)


def test_no_configuration_at_all(capsys):
    refused((run.main(["--dry-run"]), *capsys.readouterr()), "E105", "command line")


@pytest.mark.parametrize(
    ("code", "where", "name", "content"),
    [
        ("E203", "train.jsonl", "train.jsonl", b""),
        ("E204", "train.jsonl:2", "train.jsonl", b'{"prompt": "1+1="}\n{"prompt": "1+\n'),
        ("E205", "train.jsonl:1", "train.jsonl", b'{"prompt": "caf\xe9"}\n'),
        (
            "E206",
            "train.jsonl:answer",
            "train.jsonl",
            b'{"prompt": "1", "answer": 1}\n{"prompt": "2", "answer": "2"}\n',
        ),
        ("E207", "train.jsonl:2 (and 1 more)", "train.jsonl", b'{"prompt": "1"}\n{"prompt": " "}\n{"prompt": ""}\n'),
        ("E210", "run.toml:data.train", "train.py", b""),
    ],
)
def test_a_wrong_data_file(answer, place, code, where, name, content):
    (place / name).write_bytes(content)
    refused(answer(**{"data.train": name}), code, where)


def test_evaluation_rows_among_the_training_rows(answer, place):
    write_rows(place / "eval.jsonl", [{"prompt": "9+9=", "answer": "18"}, ROWS[0], ROWS[2]])
    result = answer(**{"data.eval": "eval.jsonl"})
    refused(result, "E209", "eval.jsonl:2")
    assert "Found 2 shared prompts" in result[2]


def broken_weights(model: Path) -> None:
    write_safetensors(model / "model.safetensors", missing=8)


def no_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x00" * 4)


def html_page(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html>404 not found</html>" * 9)


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"hidden_size": 64,')


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')


def no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def renamed_weights(model: Path) -> None:
    shapes = qwen2_shapes(json.loads((model / "config.json").read_text()))
    write_tensors(model / "model.safetensors", {f"_orig_mod.{name}": shape for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("code", "where", "shape", "spoil"),
    [
        ("E411", "model", {}, renamed_weights),
        ("E412", "config.json:quantization_config", {"quantization_config": {"quant_method": "awq"}}, None),
        ("E412", "config.json:architectures", {"architectures": ["Qwen2ForSequenceClassification"]}, None),
        ("E402", "run.toml:model.tokenizer", {"vocab_size": 8}, None),
        ("E408", "run.toml:model.path", {"auto_map": {"AutoModel": "m.M"}}, None),
        ("E410", "config.json:head_dim", {"num_attention_heads": 4}, None),
        ("E410", "config.json:head_dim", {"head_dim": 48}, None),
        ("E409", "model", {}, pickle_only),
        ("E411", "model.safetensors", {}, broken_weights),
        ("E411", "model.safetensors", {}, no_header),
        ("E411", "model.safetensors", {}, html_page),
        ("E401", "run.toml:model.tokenizer", {}, no_tokenizer),
        ("E401", "run.toml:model.tokenizer", {}, broken_tokenizer),
        ("E401", "model", {}, broken_config),
    ],
)
def test_a_wrong_model(answer, place, code, where, shape, spoil):
    model = write_model(place / "model", **shape)
    if spoil:
        spoil(model)
    refused(answer(), code, where)
    refused(answer("--dry-run"), code, where)


def test_all_problems_are_printed_together(answer):
    _, _, err = answer(**{"rollout.tensor_parallel_size": 3, "rollout.max_new_tokens": 49})
    assert [line[6:10] for line in err.splitlines()[:-1]] == ["E406", "E407"]
    _, _, err = answer(**{"data.train": "nope.jsonl", "data.eval": "nor.jsonl"})
    assert [line[6:10] for line in err.splitlines()[:-1]] == ["E201", "E201"]


# --- output and cluster ---


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["start", "dry-run"])
def test_an_output_directory_in_use(answer, place, flags):
    (place / "out").mkdir()
    (place / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(answer(*flags, **{"run.resume": "never"}), "E602", str(place / "out"))


@pytest.fixture
def cluster(monkeypatch, no_cluster):
    return partial(fake_cluster, monkeypatch)


@pytest.mark.parametrize(
    ("size", "what", "found", "fix"),
    [
        ({"cpus": 3}, "not enough CPUs", "3 in the cluster, expected 5 (engines 4 x 1, learner 1)", "num_engines = 2"),
        ({"cpus": 1}, "not enough CPUs", "1 in the cluster", "at least 5 CPUs"),
        ({"cpus": 64, "gpus": 2}, "not enough GPUs", "2 in the cluster, expected 5", "num_engines = 1"),
    ],
)
def test_not_enough_resources(answer, cluster, size, what, found, fix):
    ray = cluster(**size)
    result = answer(**{"rollout.num_engines": 4})
    refused(result, "E501", "run.toml:rollout.num_engines")
    assert all(text in result[2] for text in (what, found, fix))
    assert (ray.calls["actors"], ray.calls["shutdown"]) == (0, 1)


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("no\ntoken"), ValueError("bad address")])
def test_ray_cannot_be_reached(answer, cluster, error):
    cluster(error)
    result = answer()
    refused(result, "E502", "RAY_ADDRESS=10.0.0.1:6379")
    assert str(error).replace("\n", " ") in result[2]


def test_a_dry_run_prints_warnings_and_the_configuration_and_starts_nothing(answer, cluster, place):
    ray = cluster()
    write_rows(place / "train.jsonl", [*ROWS, ROWS[0]])
    code, out, err = answer("--dry-run")
    assert (code, err) == (0, "")
    assert "warning[W209] duplicate prompts — train.jsonl. Found 1, expected none." in out
    assert "group_size = 2" in out
    assert (ray.calls["actors"], ray.calls["shutdown"]) == (0, 1)
    assert not (place / "out").exists()


# --- the planner and the simulator ---

QUIET = '{"decode_step_s": 0, "decode_sequence_s": 0, "train_step_s": 0, "train_token_s": 0, "publish_s": 0}'


@pytest.mark.parametrize(
    ("code", "where", "content"),
    [
        ("E105", "t.json", "[1]"),
        ("E105", "t.json", "null"),
        ("E105", "t.json", "3"),
        ("E105", "t.json", "\xff"),
        ("E105", "t.json", "[" * 100_000),
        ("E101", "t.json:decode_s", '{"decode_s": 1}'),
        ("E102", "t.json:lengths", '{"lengths": [-5]}'),
        ("E102", "t.json:lengths", '{"lengths": [0]}'),
        ("E102", "t.json:lengths", '{"lengths": ["a"]}'),
        ("E102", "t.json:lengths", '{"lengths": [1.5, 2]}'),
        ("E102", "t.json:lengths", '{"lengths": [true]}'),
        ("E102", "t.json:lengths", '{"lengths": [[1, 2], [3]]}'),
        ("E102", "t.json:lengths", '{"lengths": [1e400]}'),
        ("E102", "t.json:lengths", '{"lengths": 3}'),
        ("E102", "t.json:mean_length", '{"mean_length": 0}'),
        ("E102", "t.json:mean_length", '{"mean_length": 0.5}'),
        ("E102", "t.json:mean_length", '{"mean_length": true}'),
        ("E102", "t.json:mean_length", '{"mean_length": "12"}'),
        ("E102", "t.json:mean_length", '{"mean_length": null}'),
        ("E102", "t.json:mean_length", '{"mean_length": 600, "longest": 512}'),
        ("E102", "t.json:longest", '{"longest": 0}'),
        ("E102", "t.json:longest", '{"longest": 1.5}'),
        ("E102", "t.json:prompt_tokens", '{"prompt_tokens": 1e30}'),
        ("E102", "t.json:prompt_tokens", '{"prompt_tokens": NaN}'),
        ("E102", "t.json:decode_step_s", '{"decode_step_s": NaN}'),
        ("E102", "t.json:decode_step_s", '{"decode_step_s": Infinity}'),
        ("E102", "t.json:decode_step_s", '{"decode_step_s": -1}'),
        ("E102", "t.json:decode_step_s", '{"decode_step_s": false}'),
        ("E102", "t.json:decode_step_s", QUIET),
        ("E102", "t.json:together", '{"together": 0, "cores": 2}'),
        ("E102", "t.json:cores", '{"cores": 1.5}'),
        ("E102", "t.json:room", '{"room": -1}'),
    ],
)
def test_wrong_timings(place, capsys, code, where, content):
    (place / "t.json").write_bytes(content.encode("latin-1"))
    file = str(write_config(place / "run.toml"))
    for verb, arguments in ((plan, [file, "--devices", "4"]), (simulate, ["--engines", "2", "--steps", "3"])):
        refused((verb.main([*arguments, "--timings", "t.json"]), *capsys.readouterr()), code, where)


@pytest.mark.parametrize(
    ("code", "where", "arguments"),
    [
        ("E102", "command line:--steps", ["--steps", "0"]),
        ("E102", "command line:--steps", ["--steps", "1"]),
        ("E102", "command line:--steps", ["--steps", "-1"]),
        ("E102", "command line:--ranks", ["--ranks", "0"]),
        ("E102", "command line:--ranks", ["--ranks", "-1"]),
        ("E104", "command line:--ranks", ["--ranks", "33", "--engines", "1"]),
        ("E104", "command line:--ranks", ["--ranks", "5", "--engines", "1"]),
        ("E102", "command line:--engines", ["--engines", "0"]),
        ("E102", "command line:--groups-per-engine", ["--groups-per-engine", "0"]),
        ("E102", "command line:--ranks", ["run.toml", "--ranks", "0"]),
        ("E104", "run.toml:learner.prompts_per_step", ["run.toml", "--ranks", "3"]),
        ("E104", "run.toml:learner.prompts_per_step", ["run.toml", "--ranks", "100000"]),
        ("E108", "run.toml:rollout.cpu_cores", ["cores.toml", "--engines", "3"]),
        ("E105", "nope.toml", ["nope.toml"]),
        ("E106", "command line", ["--engines", "x"]),
    ],
)
def test_a_wrong_simulation(place, capsys, code, where, arguments):
    write_config(place / "run.toml")
    write_config(place / "cores.toml", **{"rollout.num_engines": 2, "rollout.cpu_cores": "0|1"})
    result = (simulate.main(arguments), *capsys.readouterr())
    refused(result, code, where.replace("run.toml", arguments[0]) if arguments[0].endswith("toml") else where)


@pytest.mark.parametrize(
    ("code", "where", "arguments"),
    [
        ("E102", "command line:--mean-tokens", ["--mean-tokens=nan"]),
        ("E102", "command line:--mean-tokens", ["--mean-tokens=inf"]),
        ("E102", "command line:--mean-tokens", ["--mean-tokens=-5"]),
        ("E102", "command line:--mean-tokens", ["--mean-tokens=0"]),
        ("E102", "command line:--mean-tokens", ["--mean-tokens=17"]),
        ("E102", "command line:--prompt-tokens", ["--prompt-tokens=nan"]),
        ("E102", "command line:--prompt-tokens", ["--prompt-tokens=inf"]),
        ("E102", "command line:--prompt-tokens", ["--prompt-tokens=-500"]),
        ("E102", "command line:--prompt-tokens", ["--prompt-tokens=0"]),
        ("E102", "command line:--prompt-tokens", ["--prompt-tokens=49"]),
        ("E501", "command line:--devices", ["--devices", "0"]),
        ("E501", "command line:--devices", ["--devices", "-3"]),
        ("E601", "command line:--save", ["--save", "nowhere/t.json"]),
        ("E601", "command line:--save", ["--save", "."]),
        ("E601", "command line:--picture", ["--picture", "nowhere/plan.png"]),
        ("E601", "command line:--picture", ["--picture", "plan.nonsense"]),
        ("E601", "command line:--picture", ["--picture", "plan"]),
        ("E601", "command line:--picture", ["--picture", "."]),
    ],
)
def test_a_wrong_plan_is_refused_before_the_work(place, capsys, monkeypatch, code, where, arguments):
    monkeypatch.setattr("launch.plan._timings", lambda *_: pytest.fail("the work has begun"))
    changes = {"rollout.max_new_tokens": 16, "rollout.max_prompt_tokens": 48}
    file = str(write_config(place / "run.toml", **changes))
    refused((plan.main([file, "--devices", "2", "--device", "h200", *arguments]), *capsys.readouterr()), code, where)


def test_lengths_are_for_a_data_sheet(place, capsys):
    file = str(write_config(place / "run.toml"))
    result = (plan.main([file, "--devices", "2", "--mean-tokens", "5"]), *capsys.readouterr())
    refused(result, "E108", "command line")


def test_a_picture_that_may_not_be_written(place, capsys, monkeypatch):
    monkeypatch.setattr("launch.options.os.access", lambda *_: False)
    file = str(write_config(place / "run.toml"))
    result = (plan.main([file, "--devices", "2", "--device", "h200"]), *capsys.readouterr())
    refused(result, "E601", "command line:--picture plan.png")


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.mark.parametrize(
    ("found", "content"),
    [
        ("a list", []),
        ("a NoneType", None),
        ("hidden_size = None", {}),
        ("hidden_size = 'big'", SIZES | {"hidden_size": "big"}),
        ("num_attention_heads = 0", SIZES | {"num_attention_heads": 0}),
        ("num_key_value_heads = -1", SIZES | {"num_key_value_heads": -1}),
        ("head_dim = 'x'", SIZES | {"head_dim": "x"}),
        ("vocab_size = 1.5", SIZES | {"vocab_size": 1.5}),
        ("num_hidden_layers = True", SIZES | {"num_hidden_layers": True}),
        ("hidden_size = 10000", SIZES | {"hidden_size": 10**400}),
    ],
)
def test_a_model_whose_sizes_cannot_be_read(place, capsys, found, content):
    (place / "model" / "config.json").write_text(json.dumps(content))
    file = str(write_config(place / "run.toml", **{"model.path": "model"}))
    result = (plan.main([file, "--devices", "2", "--device", "h200"]), *capsys.readouterr())
    refused(result, "E401", "model/config.json")
    assert found in result[2]


# --- exit codes ---


def test_help_lists_every_setting_and_returns_0(capsys):
    assert run.main(["--help"]) == run.main(["run.toml", "-h"]) == 0
    out = capsys.readouterr().out
    assert "--rollout.max_staleness  (1)" in out
    assert run.main([]) == 2


def test_a_bug_of_ours_is_exit_code_1_with_its_traceback(answer, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("ours")

    monkeypatch.setattr("launch.preflight.prepare", fail)
    code, _, err = answer()
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("error[E000] unexpected AttributeError: ours\nexit code 1\n")


def test_debug_shows_the_traceback_of_an_input_error(answer):
    with pytest.raises(Exception, match="E401"):
        answer("--debug", **{"model.path": "nope"})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, "Fix: millrace train"),
        ([], 2, "usage"),
        (["--help"], 0, "pass@k"),
        (["train", "nope.toml"], 2, "E105"),
        (["eval", "nope.toml"], 2, "E105"),
        (["show"], 2, "E106"),
        (["plan", "nope.toml", "--devces", "8"], 2, "--devices"),
    ],
)
def test_the_command(monkeypatch, capsys, arguments, code, said):
    monkeypatch.setattr(sys, "argv", ["millrace", *arguments])
    assert cli.main() == code
    out, err = capsys.readouterr()
    assert said in out + err
    assert "Traceback" not in err


def test_help_and_a_mistyped_key_answer_within_two_seconds_without_heavy_libraries(tmp_path):
    config = write_config(tmp_path / "run.toml", **{"rollout.group_sise": 2})
    for arguments, code, said in (["--help"], 0, "--run.steps"), ([str(config)], 2, "error[E101]"):
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            command = [sys.executable, "-X", "importtime", "launch/run.py", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(60), check=False)
            seconds.append(time.monotonic() - started)
        assert done.returncode == code
        assert said in done.stdout + done.stderr
        imported = {
            line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
        }
        assert "pydantic" in imported
        assert not imported & {"torch", "ray", "vllm", "deepspeed", "transformers"}
        assert min(seconds) < 2, seconds
