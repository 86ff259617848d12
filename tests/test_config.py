"""Reading and checking a configuration: files, overrides, defaults, and every error a table can hold."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import Choice, Config
from shared.config_loader import known_keys, load_config
from shared.errors import GroupFailed, InputError, InputErrors, MillraceError, nearest, one_line, visible
from tests.fakes import config_table, make_config, write_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(tmp_path):
    """``load(overrides, **changes)`` reads the small configuration back from a file."""

    def read(overrides=None, **changes) -> Config:
        return load_config([str(write_config(tmp_path / "run.toml", **changes))], overrides)

    return read


def problems(excinfo) -> list[tuple[str, str]]:
    """``(code, place)`` of every problem raised."""
    error = excinfo.value
    return [(e.code, e.place) for e in (error.problems if isinstance(error, InputErrors) else [error])]


def test_what_the_file_leaves_out_has_a_default(load):
    config = load()
    assert config.rollout.group_size == 2
    assert (config.run.steps, config.rollout.temperature, config.learner.lr) == (100, 1.0, 1e-6)
    assert (config.algorithm.advantage.name, config.algorithm.policy_loss.args) == ("grpo", {})


def test_later_files_win_key_by_key(tmp_path):
    first = write_config(tmp_path / "a.toml", **{"learner.lr": 1e-5, "run.steps": 7})
    second = tmp_path / "b.toml"
    second.write_text("[learner]\nlr = 2e-5\n")
    config = load_config([str(first), str(second)])
    assert (config.learner.lr, config.run.steps, config.learner.prompts_per_step) == (2e-5, 7, 2)


def test_choosing_another_function_drops_the_arguments_of_the_first(tmp_path):
    first = write_config(tmp_path / "a.toml", **{"algorithm.policy_loss": {"name": "clip", "low": 0.1}})
    second = tmp_path / "b.toml"
    second.write_text('[algorithm]\npolicy_loss = { name = "cispo" }\n')
    assert load_config([str(first), str(second)]).algorithm.policy_loss.args == {}
    second.write_text("[algorithm.policy_loss]\nhigh = 0.3\n")
    assert load_config([str(first), str(second)]).algorithm.policy_loss.args == {"low": 0.1, "high": 0.3}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("learner.lr", "2e-6", 2e-6),
        ("run.steps", "12", 12),
        ("run.resume", "never", "never"),
        ("run.output_dir", "out/7", "out/7"),
        ("run.output_dir", "7", "7"),  # A string stays a string, even where it looks like a number.
        ("data.eval", "none", None),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("rollout.stop", '["a", "b"]', ["a", "b"]),
        ("learner.betas", "[0.8, 0.9]", [0.8, 0.9]),
        ("rollout.vllm.enforce_eager", "true", {"enforce_eager": True}),
        ("learner.weight_decay", "0", 0.0),
        ("data.date", "2026-11-28", "2026-11-28"),
    ],
)
def test_an_override_gets_the_type_of_its_key(load, key, text, expected):
    section, name, *_ = key.split(".")
    value = getattr(getattr(load({key: text}), section), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ['"2026-02-28"', "2026-02-28"])
def test_a_day_may_be_text_or_a_date_of_toml(tmp_path, text):
    first, second = write_config(tmp_path / "a.toml"), tmp_path / "b.toml"
    second.write_text(f"[data]\ndate = {text}\n")
    assert load_config([str(first), str(second)]).data.date == "2026-02-28"


def test_a_day_that_is_not_in_the_calendar_is_told_in_words(load):
    with pytest.raises(InputErrors, match='Found "2026-02-30", expected a day as YYYY-MM-DD'):
        load(**{"data.date": "2026-02-30"})


def test_an_override_beats_every_file(load):
    config = load({"algorithm.policy_loss.name": "cispo"}, **{"algorithm.policy_loss.name": "clip"})
    assert config.algorithm.policy_loss.name == "cispo"


@pytest.mark.parametrize(
    ("changes", "code", "place"),
    [
        ({"rollout.group_sise": 4}, "E101", "run.toml:rollout.group_sise"),
        ({"rolout": {"group_size": 4}}, "E101", "run.toml:rolout"),
        ({"reward.functions": [{"function": "regex", "wieght": 2.0}]}, "E101", "run.toml:reward.functions.0.wieght"),
        ({"learner.lr": "abc"}, "E102", "run.toml:learner.lr"),
        ({"learner.lr": 0.0}, "E102", "run.toml:learner.lr"),
        ({"run.steps": 0}, "E102", "run.toml:run.steps"),
        ({"run.steps": 2.5}, "E102", "run.toml:run.steps"),
        ({"run.resume": "yes"}, "E102", "run.toml:run.resume"),
        ({"model.dtype": "float64"}, "E102", "run.toml:model.dtype"),
        ({"data.date": "2026-13-28"}, "E102", "run.toml:data.date"),
        ({"data.date": 20261128.5}, "E102", "run.toml:data.date"),
        ({"rollout": 3}, "E102", "run.toml:rollout"),
        ({"learner.betas": [0.9]}, "E102", "run.toml:learner.betas"),
        ({"model.path": None}, "E102", "run.toml:model.path"),
        ({"reward.functions": []}, "E102", "run.toml:reward.functions"),
        ({"rollout.group_size": 1}, "E103", "run.toml:rollout.group_size"),
        ({"learner.num_ranks": 3}, "E104", "run.toml:learner.prompts_per_step"),
        ({"rollout.colocate": True, "rollout.num_engines": 2}, "E108", "run.toml:rollout.colocate"),
        ({"rollout.top_p": 0.9}, "E108", "run.toml:rollout.top_p"),
        ({"rollout.top_k": 5}, "E108", "run.toml:rollout.top_k"),
        ({"rollout.min_p": 0.1}, "E108", "run.toml:rollout.min_p"),
        ({"algorithm.old_logprobs": "rollout"}, "E108", "run.toml:algorithm.old_logprobs"),
        ({"learner.max_tokens_per_microbatch": 19}, "E108", "run.toml:learner.max_tokens_per_microbatch"),
        ({"rollout.kv_cache_gib": 0.5}, "E504", "run.toml:rollout.kv_cache_gib"),
        ({"rollout.kv_cache_gib": 0}, "E504", "run.toml:rollout.kv_cache_gib"),
    ],
)
def test_a_wrong_value_is_one_error_at_its_key(load, changes, code, place):
    with pytest.raises((InputError, InputErrors)) as excinfo:
        load(**changes)
    (found,) = problems(excinfo)
    assert found[0] == code
    assert place in found[1]


@pytest.mark.parametrize(
    ("key", "text", "fix"),
    [
        ("rollout.num_engine", "2", "--rollout.num_engines"),
        ("rolout.num_engines", "2", "--rollout"),
        ("run.steps", "many", "--run.steps 100"),
        ("run.steps", "0", "--run.steps 100"),
        ("run.steps.more", "1", ""),
        ("reward.functions.0.weight", "2", ""),
    ],
)
def test_a_wrong_override_is_e106_at_the_command_line(load, key, text, fix):
    with pytest.raises((InputError, InputErrors)) as excinfo:
        load({key: text})
    ((code, place),) = problems(excinfo)
    assert (code, place) == ("E106", f"command line:--{key}")
    assert fix in str(excinfo.value)


def test_all_problems_of_a_pass_are_reported_together(load):
    with pytest.raises(InputErrors) as excinfo:
        load(**{"rollout.group_sise": 4, "learner.lr": "abc", "run.steps": 0})
    assert sorted(code for code, _ in problems(excinfo)) == ["E101", "E102", "E102"]
    with pytest.raises(InputErrors) as excinfo:
        load(**{"rollout.group_size": 1, "rollout.top_p": 0.5})
    assert [code for code, _ in problems(excinfo)] == ["E103", "E108"]


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"learner.lrr": 0.1, "rollout.group_size": 1}, ["E101", "E103"]),
        ({"learner.lr": "abc", "learner.num_ranks": 3}, ["E102", "E104"]),
        ({"rolout.num_engines": 2, "rollout.top_p": 0.5}, ["E101", "E108"]),
        ({"rollout": 3, "eval.early_stopping.name": "best", "learner.num_ranks": "two"}, ["E102", "E102"]),
        # What hangs on the refused value, or on the one that a misspelled key means, cannot be judged.
        ({"rollout.group_size": "four", "learner.num_ranks": 3}, ["E102"]),
        ({"rollout.group_sise": 6, "learner.num_ranks": 3}, ["E101"]),
        ({"rollout.max_new_tokens": "x", "learner.max_tokens_per_microbatch": 19}, ["E102"]),
        ({"reward.functions": 3, "rollout.group_size": 1}, ["E102"]),
    ],
)
def test_settings_that_disagree_are_told_beside_refused_ones_unless_they_hang_on_them(load, changes, codes):
    with pytest.raises(InputErrors) as excinfo:
        load(**changes)
    assert [code for code, _ in problems(excinfo)] == codes


@pytest.mark.parametrize(
    ("content", "place", "found"),
    [
        (None, "run.toml", "no such file"),
        (b"[learner]\nlr = \n", "run.toml:2:6", '"lr =" (Invalid value)'),
        (b'name = "caf\xe9"\n', "run.toml", "0xe9"),
    ],
)
def test_an_unreadable_file_is_e105(tmp_path, content, place, found):
    (tmp_path / "runs.toml").write_text("")
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(InputError) as excinfo:
        load_config([str(tmp_path / "run.toml")])
    assert problems(excinfo)[0][0] == "E105"
    assert place in excinfo.value.place
    assert found in excinfo.value.found
    if content is None:
        assert "runs.toml" in excinfo.value.fix


def test_a_file_that_may_not_be_read_is_e105(load, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(InputError, match=r"E105.*Permission denied"):
        load_config(["quickstart"])


def test_a_group_of_one_is_accepted_where_no_group_baseline_is_used(load):
    changes = {"rollout.group_size": 1, "algorithm.advantage.name": "reinforce_pp"}
    assert load(**changes).rollout.group_size == 1


def test_rollout_logprobs_as_old_ones_need_no_correction(load):
    config = load(**{"algorithm.old_logprobs": "rollout", "algorithm.importance_sampling.level": "none"})
    assert config.algorithm.old_logprobs == "rollout"


def test_the_configuration_is_frozen():
    with pytest.raises(ValidationError):
        make_config().run.steps = 3


def test_derived_values():
    config = make_config(**{"eval.max_new_tokens": 9, "rollout.group_size": 3})
    assert (config.max_model_len, config.completions_per_step) == (16 + 9, 6)
    assert config.canary_tolerance == 1e-3
    assert make_config(**{"model.dtype": "bfloat16"}).canary_tolerance == 0.25
    assert make_config(**{"rollout.canary_tolerance": 0.5}).canary_tolerance == 0.5


def test_extra_keys_of_a_choice_are_its_arguments():
    choice = Choice.model_validate({"name": "clip", "low": 0.2})
    assert (choice.name, choice.args) == ("clip", {"low": 0.2})


def test_every_setting_has_a_description_and_there_are_at_most_120():
    keys = known_keys()
    assert "rollout.max_staleness" in keys
    assert [key for key, field in keys.items() if not field.description] == []
    assert len(keys) <= 120


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads(path):
    assert load_config([str(path)]).run.steps >= 1


def test_the_table_of_the_tests_is_valid_toml(tmp_path):
    assert tomllib.loads(write_config(tmp_path / "run.toml").read_text()) == config_table()


# --- errors ---


def test_errors_survive_a_process_border():
    error = InputError("E101", "unknown key", "run.toml:a", "b", "c", "d")
    again = pickle.loads(pickle.dumps(InputErrors([error, error])))
    assert str(again) == f"{error}\n{error}"
    assert again.exit_code == 2
    assert str(error) == "error[E101] unknown key — run.toml:a. Found b, expected c. Fix: d"


def test_nearest_and_one_line():
    assert nearest("group_sise", ["group_size", "seed"]) == "group_size"
    assert nearest("zzz", ["group_size", "seed"]) is None
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 300, 10) == "x" * 9 + "…"
    assert one_line("\x1b[36mred\x1b[39m \x1b]0;title\x07 \x9b") == r"red \x1b]0;title\x07 \x9b"


def test_what_a_terminal_would_obey_is_written_out_and_all_else_stays():
    assert visible("\x1b]0;title\x07 a\tb\r\nc\rd \x9b \x7f") == "\\x1b]0;title\\x07 a\tb\nc\\x0dd \\x9b \\x7f"
    assert visible("a\u202eb \ud800") == "a\\u202eb \\ud800"
    plain = "äöü 汉字 🙂 مرحبا \xa0"
    assert visible(plain) == plain


HIDDEN = "\x1b[31mred\x9b"


@pytest.mark.parametrize(
    "error",
    [
        MillraceError(HIDDEN),
        InputError("E1", HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN),
        GroupFailed(1, HIDDEN, HIDDEN),
        InputErrors([InputError("E1", HIDDEN, "b", "c", "d", "e")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_moves_a_terminal(error):
    assert "\\x1b[31mred\\x9b" in str(error)
    assert not {"\x1b", "\x9b"} & set(str(error))


PYDANTIC = """pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['NewForCausalLM'] failed to be inspected. [type=value_error, input_value=ArgsKwargs((), {'model': 'm', 'a': '1, input_type'}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error"""
FRAMES = '  File "/x/a.py", line 3, in build\n    Thing(**arguments)\n' * 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"1 {PYDANTIC[-500:]}", "failed to be inspected."),
        (f"Traceback (most recent call last):\n{FRAMES}ValueError: no such model\nin the folder", "ValueError: no such model in the folder"),
        (f"died in its task, ray::Engine() (pid=1)\n{FRAMES}{PYDANTIC}", "Model architectures ['NewForCausalLM'] failed to be inspected."),
        (
            f"died, ray::Engine()\n{FRAMES}ImportError: no triton\n\nThe above exception was the direct cause of the following exception:\n\n"
            f"ray::Engine()\n{FRAMES}{PYDANTIC}",
            "failed to be inspected. (cause: ImportError: no triton)",
        ),
        (
            f"Traceback (most recent call last):\n{FRAMES}KeyError: 'x'\n\nDuring handling of the above exception, another exception "
            f"occurred:\n\nTraceback (most recent call last):\n{FRAMES}RuntimeError: {'long ' * 99}",
            "… (cause: KeyError: 'x')",
        ),
        (
            f"Traceback (most recent call last):\n{FRAMES}ray.exceptions.RayTaskError(OSError): \x1b[36mray::f()\x1b[39m (pid=2)\n"
            f"{FRAMES}OSError: disk full",
            "OSError: disk full",
        ),
    ],
    ids=["no traceback", "traceback", "pydantic", "cause", "context", "traceback in a message"],
)  # fmt: skip
def test_what_was_raised_stays_when_a_long_error_is_shortened(text, said):
    line = one_line(text, 400)
    assert line.endswith(said)
    assert len(line) <= 400
    assert "\n" not in line
    assert "errors.pydantic.dev" not in line
    assert "File" not in line


def test_a_text_that_fits_is_not_shortened():
    assert one_line('  File "a.py", line 3\nValueError: short', 400) == 'File "a.py", line 3 ValueError: short'


@pytest.mark.parametrize(
    ("changes", "admitted"),
    [
        ({}, 256),
        ({"rollout.max_staleness": 99}, 400),
        ({"rollout.max_staleness": 199, "rollout.num_engines": 2}, 400),
        ({"rollout.max_staleness": 400}, 1024),
        ({"rollout.max_staleness": 400, "rollout.vllm": {"max_num_seqs": 2048}}, 2048),
        ({"rollout.vllm": {"max_num_seqs": 7}}, 7),
        ({"rollout.vllm": {"max_num_seqs": "many"}}, 256),  # Refused by vLLM, not by arithmetic on it.
    ],
)
def test_an_engine_admits_what_is_in_flight_within_reason(changes, admitted):
    assert make_config(**changes).max_num_seqs == admitted
