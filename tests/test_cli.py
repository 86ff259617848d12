"""The command line: help with defaults and examples, suggestions, completion, shipped configurations, and how fast it answers."""

from __future__ import annotations

import importlib
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch import bench, cli, run, shipped
from launch.bench import WORKLOADS
from launch.cli import GROUPS, VERBS
from launch.options import ConfigOptions, Options, guarded, settings_help
from shared import config_loader
from shared.config_loader import config_file, known_keys, load_config
from shared.errors import InputError, InputErrors
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
MILLRACE = str(Path(sys.executable).with_name("millrace"))


def parser_of(verb: str) -> Options:
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(module), "resume_parser" if function == "resume" else "parser")()


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["millrace", *arguments])
    return cli.main()


# --- help ---


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_of_itself(verb, monkeypatch, capsys):
    assert call(monkeypatch, verb, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: millrace")
    assert f"millrace {verb}" in out.split("examples:")[1]
    assert "Traceback" not in out
    text = out.split("examples:")[0].split("\n\n", 1)[1]
    assert f"millrace {verb}" in text.splitlines()[0]
    assert [word for word in OF_DEVELOPERS if word in text.lower()] == []


OF_DEVELOPERS = ("invariant", "preflight", "imported late", "controller", "probe", "the wish", "docstring")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb):
    assert [action.option_strings for action in parser_of(verb)._actions if not action.help] == []


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_option_of_every_bench_says_what_it_does(workload):
    assert [action.option_strings for action in bench.parser(workload)._actions if not action.help] == []


def test_the_overview_has_every_verb_once(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert [len(re.findall(rf"^  {verb} ", out, re.M)) for verb in VERBS] == [1] * len(VERBS)
    assert all(title in out for title in GROUPS)


def test_the_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert re.fullmatch(r"millrace \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_for_some_settings_alone(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--help", "staleness") == 0
    out = capsys.readouterr().out
    assert "--rollout.max_staleness  (1)" in out
    assert "--learner.lr" not in out
    assert settings_help("nothing like it") == "no setting contains nothing like it"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("learning_rate", ["--learner.lr  (1e-06)", "in TRL:", "  learning_rate: --learner.lr"]),
        ("wandb", ["--run.sinks  ([])"]),
        ("lora", ["no setting contains lora", "  lora_r: no such setting here; no adapters"]),
        ("Optimizer-Step", ["--rollout.max_staleness  (1)"]),
    ],
)
def test_help_for_a_word_finds_meanings_and_the_names_of_trl(word, shown):
    text = settings_help(word)
    assert [line for line in shown if line not in text] == []
    assert "--rollout.colocate" not in text


def test_defaults_are_shown_where_there_are_some():
    text = parser_of("scale").format_help()
    assert "longest wait for the run's answer (default: 60.0)" in text
    assert "(default: None)" not in parser_of("plan").format_help()
    assert "(default: False)" not in parser_of("train").format_help()


# --- wrong options ---


@pytest.mark.parametrize(
    ("arguments", "place", "fix"),
    [
        (["--engine", "3"], "command line:--engine", "--engines"),  # Never taken for --engines.
        (["--engines", "3", "more"], "command line:more", "millrace x --help"),
        (["--engines", "three"], "command line", "millrace x --help"),
        ([], "command line", "millrace x --help"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest(arguments, place, fix):
    options = Options("x", "Text.")
    options.add_argument("--engines", type=int, required="--engine" not in arguments, help="how many")
    with pytest.raises(InputError) as excinfo:
        options.parse_args(arguments)
    assert (excinfo.value.code, excinfo.value.place, excinfo.value.fix) == ("E106", place, fix)


@pytest.mark.parametrize("arguments", [["my.toml", "--dryrun"], ["--dryrun", "my.toml"], ["my.toml", "--dryrun=yes"]])
def test_a_mistyped_option_is_not_taken_for_a_setting(arguments):
    options = ConfigOptions("train", "Text.")
    options.add_argument("--dry-run", action="store_true", help="what it does")
    with pytest.raises(InputError) as excinfo:
        options.parse_config(arguments)
    assert (excinfo.value.place, excinfo.value.fix) == ("command line:--dryrun", "--dry-run")


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("--lr", "--learner.lr"),
        ("--learning_rate", "--learner.lr"),
        ("--learning-rate", "--learner.lr"),
        ("--learning_rte", "--learner.lr"),
        ("--beta", "--algorithm.kl.coef"),
        ("--num_generations", "--rollout.group_size"),
        ("--temperature", "--rollout.temperature"),
        ("--model_name_or_path", "--model.path"),
        ("--max_steps", "--run.steps (rounded up to whole generated batches)"),
        ("--use_peft", "remove it: no adapters: every parameter is trained"),
        ("--wandb", "millrace train --help wandb"),
        ("--bogus", "millrace train --help"),
        ("--learner.learning_rate", "--learner.lr"),
        ("--algorithm.beta", "--algorithm.kl.coef"),
        ("--learnr.lr", "--learner.lr"),
        ("--rollout.num_engine", "--rollout.num_engines"),
    ],
)
def test_a_setting_under_another_name_is_told_by_its_own(written, fix, capsys):
    assert run.main(["quickstart", written, "1", "--dry-run"]) == 2
    (line, _) = capsys.readouterr().err.splitlines()
    assert line.startswith("error[E106] ")
    assert f"— command line:{written}." in line
    assert line.endswith(f"Fix: {fix}")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("[learner]\nlearning_rate = 1e-6", "did you mean learner.lr?"),
        ("[rollout]\nnum_generations = 8", "did you mean rollout.group_size?"),
        ("[run]\nlr = 1e-6", "did you mean learner.lr?"),
        ("[learner]\nweight_decey = 0.1", "did you mean learner.weight_decay?"),
        ("[learnr]\nlr = 1e-6", "did you mean learner?"),
        ("[model]\nuse_peft = true", "remove it: no adapters: every parameter is trained"),
    ],
)
def test_a_key_of_a_file_under_another_name_is_told_by_its_own(tmp_path, text, fix):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(InputErrors) as caught:
        load_config([str(config_file("quickstart")), str(tmp_path / "my.toml")])
    assert [(problem.code, problem.fix) for problem in caught.value.problems] == [("E101", fix)]


def test_files_options_and_settings_may_come_in_any_order():
    options = ConfigOptions("x", "Text.")
    options.add_argument("--dry-run", action="store_true", help="x")
    options.add_argument("--sample", type=int, help="x")
    given = ["--learner.lr=3e-5", "a.toml", "b.toml", "--sample", "4", "--run.steps", "7", "--dry-run"]
    found, files, settings = options.parse_config(given)
    assert (found.dry_run, found.sample, files) == (True, 4, ["a.toml", "b.toml"])
    assert settings == {"learner.lr": "3e-5", "run.steps": "7"}


def test_a_negative_number_is_a_value():
    options = ConfigOptions("x", "Text.")
    assert options.parse_config(["a.toml", "--algorithm.kl.coef", "-1"])[2] == {"algorithm.kl.coef": "-1"}


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (InputError("E1", *"abcde"), 2)])
def test_how_a_verb_ends(failure, code, capsys):
    def verb(_):
        raise failure

    assert guarded([], verb, Options("x", "Text.")) == code
    assert capsys.readouterr().err.endswith(f"exit code {code}\n")


def test_a_traceback_moves_no_terminal(capsys):
    def verb(_):
        raise ValueError("\x1b]0;title\x07")

    assert guarded([], verb, Options("x", "Text.")) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\nValueError: \\x1b]0;title\\x07\n" in said


# --- shipped configurations ---


def test_shipped_configurations_are_listed_and_printed(monkeypatch, capsys):
    assert call(monkeypatch, "configs") == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "gsm8k", "dapo", "dr_grpo"):
        assert len(re.findall(rf"^  {name} +\S.{{20,}}$", out, re.M)) == 1, name
    assert call(monkeypatch, "configs", "gsm8k") == 0
    assert capsys.readouterr().out == (ROOT / "launch" / "configs" / "gsm8k.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", config_loader.shipped())
def test_a_copy_of_a_shipped_configuration_goes_on_and_overwrites_nothing(monkeypatch, capsys, tmp_path, name):
    assert call(monkeypatch, "configs", name) == 0
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    mine, theirs = load_config([str(tmp_path / "my.toml")]), load_config([name])
    assert mine.run.resume == "auto"
    assert mine == theirs.model_copy(update={"run": theirs.run.model_copy(update={"resume": "auto"})})


def test_a_shipped_configuration_that_does_not_exist(capsys):
    assert shipped.main(["quickstrat"]) == 2
    assert "Fix: millrace configs quickstart" in capsys.readouterr().err


def test_a_name_means_a_shipped_configuration_unless_there_is_a_file(tmp_path, monkeypatch):
    assert config_file("quickstart") == ROOT / "launch" / "configs" / "quickstart.toml"
    assert load_config(["quickstart"]).run.output_dir == "runs/quickstart"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("")
    assert config_file("quickstart") == Path("quickstart")
    with pytest.raises(InputError, match="did you mean quickstart"):
        load_config(["quickstrat"])


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_verbs_options_settings_and_choices(monkeypatch, capsys, shell):
    assert call(monkeypatch, "completion", shell) == 0
    script = capsys.readouterr().out
    options = ["--dry-run", "--checkpoint", "--rollout.max_staleness", "--learner.lr", "bfloat16"]
    wanted = [*VERBS, *(options if shell != "tcsh" else [])]  # shtab offers tcsh no more than the verbs.
    assert [word for word in wanted if word not in script] == []


def test_bash_takes_the_script_and_offers_what_fits(monkeypatch, capsys, tmp_path):
    call(monkeypatch, "completion", "bash")
    (tmp_path / "c.sh").write_text(capsys.readouterr().out)

    def offered(*words: str) -> set[str]:
        line = " ".join(words)
        ask = f"""source {tmp_path}/c.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="{line}"
        COMP_POINT=${{#COMP_LINE}}; $(complete -p millrace | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert offered("millrace", "re") == {"report", "resume", "replay"}
    assert "--rollout.max_staleness" in offered("millrace", "train", "--rollout.max")
    assert offered("millrace", "train", "--model.dtype", "bf") == {"bfloat16"}


# --- how fast ---


def best_of(count: int, *command: str) -> float:
    """CPU seconds of the best try: what it takes where nobody else works, whoever does here."""
    seconds = []
    for _ in range(count):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=scaled(60))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_help_answers_within_half_a_second():
    assert best_of(3, MILLRACE, "--help") < scaled(0.5)


@pytest.mark.process
def test_a_dry_run_answers_within_three_seconds():
    command = [MILLRACE, "train", "quickstart", "--dry-run"]
    best_of(1, *command)  # The untrained model and the rows are made.
    assert best_of(3, *command) < scaled(3.0)


def test_every_setting_is_in_the_help_of_train():
    text = parser_of("train").format_help()
    assert [key for key in known_keys() if f"--{key}  (" not in text] == []
