"""``millrace show``: which groups come in which order, what a page says of them, and that text stays text."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

from launch import show
from launch.report.samples import read_samples
from launch.stored_groups import read_groups, write_groups
from shared.errors import InputError
from tests.fakes import make_completion, make_group, make_prompt


@pytest.fixture
def run(tmp_path):
    """Steps 10 and 20 of two groups each: rewards 0/1 and 1/1, then 0/0 and 0/1 with a long answer."""

    def group(number, rewards, *texts, prompt="1+1="):
        made = make_group(number, rewards)
        completions = tuple(make_completion(text, max(len(text), 1), ((3, 0, max(len(text), 1)),)) for text in texts)
        made = replace(made, completions=completions, advantages=np.array(rewards, np.float32))
        return replace(made, prompt=replace(made.prompt, text=prompt))

    write_groups(
        tmp_path / "samples" / "step-000010.parquet", [group(1, (0, 1), "a", "b"), group(2, (1, 1), "c", "d")], 10
    )
    later = [group(3, (0, 0), "e", "f", prompt="[red]2+2=[/red]"), group(4, (0, 1), "g" * 30, "Needle")]
    write_groups(tmp_path / "samples" / "step-000020.parquet", later, 20)
    return tmp_path


def groups_of(out: str) -> list[int]:
    return [int(line.split("group ")[1].split()[0]) for line in out.splitlines() if "group " in line]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [3, 4]),  # The newest step.
        (["--step", "10"], [1, 2]),
        (["--step", "0"], [1, 2, 3, 4]),
        (["--step", "0", "--sort", "reward"], [2, 1, 4, 3]),
        (["--step", "0", "--sort", "length"], [4, 1, 2, 3]),
        (["--step", "0", "--sort", "spread", "--limit", "2"], [1, 4]),
        (["--step", "0", "--search", "needle"], [4]),
        (["--step", "0", "--group", "2"], [2]),
    ],
)
def test_which_groups_come_in_which_order(run, capsys, arguments, expected):
    assert show.main([str(run), *arguments]) == 0
    assert groups_of(capsys.readouterr().out) == expected


def test_a_page_says_what_there_is_to_know(run, capsys):
    show.main([str(run), "--group", "4"])
    out = capsys.readouterr().out
    for piece in ("step 20", "reward 0.500", "Needle", "advantage +1.00", "6 tokens", "stop", "version 3"):
        assert piece in out
    assert out.index("Needle") < out.index("ggg")  # The best first.


def test_text_of_models_is_shown_and_not_interpreted(run, capsys):
    show.main([str(run), "--group", "3"])
    assert "[red]2+2=[/red]" in capsys.readouterr().out


HIDDEN = "\x1b[31mred\x1b]0;title\x07\x9b"


@pytest.mark.parametrize("arguments", [[], ["--list"], ["--tokens", "advantage"]])
def test_control_characters_of_a_run_are_shown_and_reach_no_terminal(tmp_path, capsys, monkeypatch, arguments):
    made = make_group(1)
    completions = tuple(replace(one, text=HIDDEN, finish_reason=HIDDEN) for one in made.completions)
    made = replace(made, prompt=replace(made.prompt, text=HIDDEN), completions=completions)
    made = replace(made, reward_parts={HIDDEN: made.rewards, "b": made.rewards})
    write_groups(tmp_path / "samples" / "step-000001.parquet", [made], 1)
    monkeypatch.setattr(show, "_pieces", lambda _: lambda ids: [HIDDEN for _ in ids])
    assert show.main([str(tmp_path), *arguments]) == 0
    out = capsys.readouterr().out
    assert "\\x1b" in out
    assert not set(HIDDEN) & {character for character in out if ord(character) < 32 or 127 <= ord(character) < 160}


def test_one_line_a_group(run, capsys):
    show.main([str(run), "--step", "0", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[2].split()[:5] == ["2", "10", "1.000", "0.000", "2"]


def test_a_damaged_file_is_left_out_where_there_are_others(run, capsys):
    newest = run / "samples" / "step-000020.parquet"
    newest.write_bytes(newest.read_bytes()[:-20])
    for arguments in ([], ["--step", "0"]):
        assert show.main([str(run), *arguments]) == 0
        out, said = capsys.readouterr()
        assert groups_of(out) == [1, 2]
        assert said.startswith("warning[W603]")
        assert newest.name in said
    assert show.main([str(run), "--step", "20"]) == 2
    assert "error[E603] nothing to show" in capsys.readouterr().err


SPOILED = [
    *(("names", cell) for cell in ("{", "[1]", "null", '{"parts": 3}', '{"extra": [1]}')),
    *(
        (name, None)
        for name in ("prompt", "completion", "finish_reason", "tokens", "group_id", "token_ids", "versions")
    ),
    *((name, "x") for name in ("tokens", "reward", "advantage", "rewards/r", "step", "token_ids", "group_id")),
    *(("tokens", 99), ("token_ids", [0, -1, 2]), ("rollout_logprobs", [0.5]), ("rollout_logprobs", ["a", "b", "c"])),
    *(("versions", [3, 0]), ("versions", [3, 2, 1]), ("versions", [3, 0, 99]), ("group_id", [1])),
]


@pytest.mark.parametrize("colour", ["logprobs", "versions"])
@pytest.mark.parametrize(("column", "cell"), SPOILED)
def test_no_damaged_cell_ends_show_or_report(run, capsys, monkeypatch, column, cell, colour):
    path = run / "samples" / "step-000015.parquet"
    write_groups(path, [make_group(9)], 15)
    table = pyarrow.parquet.read_table(path)
    spoiled = pyarrow.array([cell] * table.num_rows)
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index(column), column, spoiled), path)
    monkeypatch.setattr(show, "_pieces", lambda _: lambda ids: ["." for _ in ids])
    assert show.main([str(run), "--step", "0", "--tokens", colour]) == 0
    out, said = capsys.readouterr()
    assert groups_of(out) == [1, 2, 3, 4]
    assert "warning[W603]" in said
    notes: list[str] = []
    assert len(read_samples(run, lambda: lambda number: (".", False), 10**6, notes)["groups"]) == 4
    assert len(notes) == 1


def test_a_damaged_cell_is_one_line_to_who_trains_on_it(run):
    path = run / "samples" / "step-000010.parquet"
    table = pyarrow.parquet.read_table(path)
    cells = pyarrow.array(["{", *["{}"] * (table.num_rows - 1)])
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("names"), "names", cells), path)
    with pytest.raises(InputError, match=r"E606\] damaged record — .*step-000010.*Found 1 groups with damaged rows"):
        read_groups(path, make_prompt)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="E606"):
        read_groups(path, make_prompt)


def test_a_file_with_another_name_is_no_step(run, capsys):
    (run / "samples" / "step-000020 (copy).parquet").write_bytes(b"")
    assert show.main([str(run), "--step", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_a_limit_is_no_negative_number(run, capsys):
    assert show.main([str(run), "--limit", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error[E102]")


@pytest.mark.parametrize("arguments", [["nowhere"], ["RUN", "--step", "15"], ["RUN", "--search", "absent"]])
def test_what_is_not_there_is_one_line(run, capsys, arguments):
    assert show.main([str(run) if a == "RUN" else a for a in arguments]) == 2
    assert capsys.readouterr().err.startswith("error[E603] nothing to show")


@pytest.mark.parametrize(
    ("at", "answer", "expected"),
    [(0, "", 1), (1, "", 1), (1, "p", 0), (0, "p", 0), (0, "4", 1), (0, "q", -1), (0, "/needle", 1), (1, "/2+2", 0)],
)
def test_turning_pages(run, at, answer, expected):
    assert show._turn(list(show._groups(run, 20)), at, answer) == (expected, "")


@pytest.mark.parametrize("answer", ["99", "/absent", "what"])
def test_an_answer_that_leads_nowhere_stays_and_says_so(run, answer):
    at, said = show._turn(list(show._groups(run, 20)), 1, answer)
    assert at == 1
    assert said


def test_an_answer_is_repeated_and_not_interpreted(run, monkeypatch):
    answers = iter(["/[/INST]", "[/red]", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    console = Console(file=io.StringIO(), width=200)
    show._browse(console, list(show._groups(run, 20)), "none", None)
    shown = console.file.getvalue()
    assert "no '[/INST]' here" in shown
    assert "no group [/red] here" in shown


ROW = {"tokens": 3, "advantage": -9.0, "rollout_logprobs": [0.0, -50.0, -0.1], "versions": [1, 0, 1, 3, 1, 3]}


@pytest.mark.parametrize(
    ("colour", "shades"), [("logprobs", [7, 0, 6]), ("advantage", [0, 0, 0]), ("versions", [0, 7, 7])]
)
def test_tokens_are_coloured_by_what_is_asked(colour, shades):
    assert show._shades(ROW, colour) == shades


def test_coloured_tokens_are_the_texts_of_the_tokens(run):
    console = Console(file=io.StringIO(), record=True, width=80)
    group = next(show._groups(run, 20))
    console.print(show.page(group, "1 of 1", "advantage", lambda ids: [f"<{i}>" for i in ids]))
    assert "<0>" in console.export_text()
