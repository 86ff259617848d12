"""Sources of rows: folders in the hub's layouts, mapped columns, filters, mixtures with shares, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.builtin import TASKS, make_tokenizer
from rollout.datasets import read
from rollout.prompts import PromptSet, PromptStream
from shared.config_data import Filter, Source
from shared.errors import InputError
from shared.metrics import group_metrics
from tests.fakes import make_config, make_group, make_prompt, write_rows

ROWS = [{"prompt": f"{i}+0=", "answer": str(i), "level": i} for i in range(10)]


def rows_of(split="train", **source) -> list[dict]:
    return [row for _, row in read(Source(**source), split, "run.toml:data.train").rows]


def refused(**source) -> InputError:
    with pytest.raises(InputError) as excinfo:
        rows_of(**source)
    return excinfo.value


# --- where files are ---

HASH = "a09b74b3ef9c3b56"


def put(folder, name: str, marks: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder / name, [{"prompt": mark} for mark in marks])


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        ({"train.jsonl": "a", "test.jsonl": "b"}, {}, "a"),
        ({"train.jsonl": "a", "test.jsonl": "b"}, {"split": "test"}, "b"),
        ({"data/train-00000-of-00002.jsonl": "a", "data/train-00001-of-00002.jsonl": "b", "data/test-0.jsonl": "c"},
         {}, "ab"),
        ({"main/train-0.jsonl": "a", "socratic/train-0.jsonl": "b"}, {"subset": "main"}, "a"),
        ({"main/train-0.jsonl": "a", "main/test-0.jsonl": "b"}, {"subset": "main", "split": "test"}, "b"),
        ({"train/part-0.jsonl": "a", "test/part-0.jsonl": "b"}, {}, "a"),
        ({"data/hard-1.jsonl": "a", "data/hard-2.jsonl": "b", "data/easy-1.jsonl": "c"}, {"split": "data/hard-*.jsonl"},
         "ab"),
        ({"math_train.jsonl": "a", "pretraining.jsonl": "b"}, {}, "a"),  # A split is a word of its own.
        ({"train.jsonl": "a", "train_socratic.jsonl": "b", "train-small.jsonl": "c"}, {}, "a"),
        ({"train/hard.jsonl": "a", "train/easy.jsonl": "b", "test/hard.jsonl": "c"}, {}, "ba"),
        ({f"data/train-0000{i}-of-00003-{HASH}.jsonl": "abc"[i] for i in range(3)}
         | {f"data/test-00000-of-00001-{HASH}.jsonl": "d"}, {}, "abc"),
        ({f"data/train-0000{i}-of-00002-{i}{HASH[1:]}.jsonl": "ab"[i] for i in range(2)}, {}, "ab"),
        ({f"train-0000{i}-of-00002.jsonl": "ab"[i - 1] for i in (1, 2)}, {}, "ab"),  # Some count from 1.
    ],
)  # fmt: skip
def test_the_usual_layouts_of_a_dataset_folder(tmp_path, files, source, expected):
    for name, marks in files.items():
        put(tmp_path, name, marks)
    assert "".join(row["prompt"] for row in rows_of(path=str(tmp_path), **source)) == expected


def test_files_of_several_subsets_are_not_mixed_in_silence(tmp_path):
    put(tmp_path, "main/train.jsonl", "a")
    put(tmp_path, "socratic/train.jsonl", "b")
    error = refused(path=str(tmp_path))
    assert (error.code, error.place, error.fix) == ("E201", "run.toml:data.train.subset", 'subset = "main"')


@pytest.mark.parametrize("files", [("math_train.jsonl", "code_train.jsonl"), ("train.jsonl", "train.json")])
def test_files_of_several_names_are_not_mixed_in_silence(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text('[{"prompt": "a"}]' if name.endswith(".json") else '{"prompt": "a"}')
    error = refused(path=str(tmp_path))
    assert (error.code, error.place) == ("E201", "run.toml:data.train.split")
    assert all(name in error.found for name in files)
    assert rows_of(path=str(tmp_path), split=error.fix.split('"')[1]) == [{"prompt": "a"}]
    assert error.fix.endswith("for all 2, a list of sources with a split each")


def parts(name: str, which, total: int, suffix: str = "") -> dict[str, str]:
    return {f"data/{name}-{i:05d}-of-{total:05d}{suffix}.jsonl": "abcdef"[i] for i in which}


@pytest.mark.parametrize(
    ("files", "split", "missing"),
    [
        (parts("train", (0, 2), 3), None, "no train-00001-of-00003"),
        (parts("train", (0,), 3, f"-{HASH}"), None, "no train-00001-of-00003, train-00002-of-00003"),
        (parts("train", (1,), 2), None, "no train-00000-of-00002"),
        (parts("train", range(3), 3), "data/train-00001*", "no train-00000-of-00003, train-00002-of-00003"),
    ],
)
def test_a_part_that_is_not_there_or_not_taken_is_named_and_the_fix_takes_all(tmp_path, files, split, missing):
    for name, marks in files.items():
        put(tmp_path, name, marks)
    error = refused(path=str(tmp_path), **({"split": split} if split else {}))
    assert (error.code, error.place, error.found) == ("E201", "run.toml:data.train.split", missing)
    assert error.fix.startswith('split = "data/train-*.jsonl" if they are there')
    for name, marks in parts("train", range(len(files), 3), 3).items() if not split else ():
        put(tmp_path, name, marks)
    if split:
        assert "".join(r["prompt"] for r in rows_of(path=str(tmp_path), split=error.fix.split('"')[1])) == "abc"


def test_the_fix_for_several_datasets_takes_all_parts_of_one_and_none_of_another(tmp_path):
    files = parts("math_train", (0, 1), 2) | parts("math_train-hard", (2,), 1) | {"data/code_train.jsonl": "x"}
    for name, marks in files.items():
        put(tmp_path, name.replace("00002-of-00001", "00000-of-00001"), marks)
    (tmp_path / "data" / "code_train.jsonl").unlink()
    error = refused(path=str(tmp_path))
    assert error.what == "several datasets"
    assert "".join(r["prompt"] for r in rows_of(path=str(tmp_path), split=error.fix.split('"')[1])) == "ab"


@pytest.mark.parametrize(
    "names",
    [
        (f"train-00000-of-00001-{HASH}", f"train-00000-of-00001-{HASH[::-1]}"),
        (f"train-00000-of-00001-{HASH}", f"train-00000-of-00002-{HASH}"),
    ],
)
def test_parts_of_two_uploads_are_not_mixed(tmp_path, names):
    for name in names:
        put(tmp_path, f"data/{name}.jsonl", "a")
    assert (refused(path=str(tmp_path)).code, refused(path=str(tmp_path)).expected) == ("E201", "parts of one upload")


def test_a_split_that_is_not_there_names_the_files_that_are(tmp_path):
    put(tmp_path, "main/train.jsonl", "a")
    error = refused(path=str(tmp_path), split="validation")
    assert (error.code, error.place) == ("E201", "run.toml:data.train.split")
    assert "main/train.jsonl" in error.found


def test_a_dataset_that_is_a_script_is_refused(tmp_path):
    (tmp_path / "loader.py").write_text("raise SystemExit")
    assert refused(path=str(tmp_path)).code == "E210"


def test_a_hub_dataset_is_taken_from_the_cache_and_only_then_from_the_hub(tmp_path, monkeypatch):
    put(tmp_path, "main/train-0.jsonl", "a")
    asked = []

    def download(name, *, repo_type, revision, allow_patterns, local_files_only):
        asked.append((name, repo_type, revision, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not cached")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    commit = "0" * 40
    assert rows_of(path=f"openai/gsm8k@{commit}", subset="main") == [{"prompt": "a"}]
    assert asked == [("openai/gsm8k", "dataset", commit, True), ("openai/gsm8k", "dataset", commit, False)]


def test_a_hub_dataset_that_cannot_be_had_is_one_line():
    error = refused(path="openai/no-such-set")
    assert error.code == "E201"
    assert error.found.startswith('"openai/no-such-set" (no copy on this machine, and HF_HUB_OFFLINE is set)')
    assert "\n" not in str(error)


def test_a_csv_of_a_spreadsheet_has_its_first_column(tmp_path):
    (tmp_path / "train.csv").write_bytes("\ufeffprompt,answer\r\n1+1=,2\r\n".encode())
    assert rows_of(path=str(tmp_path / "train.csv")) == [{"prompt": "1+1=", "answer": "2"}]


def test_a_csv_whose_quotes_do_not_match_is_one_line_and_loses_no_row(tmp_path):
    (tmp_path / "train.csv").write_text('prompt,answer\n1+1=,2\n"What is 2+2,4\n3+3=,6\n')
    error = refused(path=str(tmp_path / "train.csv"))
    assert (error.code, error.place) == ("E204", "train.csv:4")
    (tmp_path / "train.csv").write_text(f'prompt,answer\n"{"x" * 200_000}",2\n')
    assert len(rows_of(path=str(tmp_path / "train.csv"))[0]["prompt"]) == 200_000


# --- columns, filters ---


def test_columns_are_renamed_and_replace_what_was_called_so(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"question": "q", "answer": "long", "short": "s"}])
    found = rows_of(path=str(tmp_path / "r.jsonl"), columns={"prompt": "question", "answer": "short"})
    assert found == [{"prompt": "q", "answer": "s"}]


def test_a_mapped_column_that_is_not_there(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"question": "q"}])
    error = refused(path=str(tmp_path / "r.jsonl"), columns={"prompt": "qestion"})
    assert (error.code, error.place) == ("E202", "r.jsonl:qestion")
    assert error.fix == 'run.toml:data.train.columns.prompt = "question"'


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"column": "level", "at_least": 3, "at_most": 5}, [3, 4, 5]),
        ({"column": "level", "one_of": [1, 7]}, [1, 7]),
        ({"column": "prompt", "matches": r"^[02]\+"}, [0, 2]),
        ({"column": "word", "at_most": 2}, [0, 1, 2]),  # Of a string, the length.
        ({"column": "tags", "at_least": 9}, [9]),
        ({"column": "about", "matches": "'n': [45]"}, [4, 5]),  # What has no size is only refused for its size.
    ],
)
def test_filters(tmp_path, rule, left):
    rows = [
        row | {"word": "x" * row["level"], "tags": ["t"] * row["level"], "about": {"n": row["level"]}} for row in ROWS
    ]
    write_rows(tmp_path / "r.jsonl", rows)
    rows = read(Source(path=str(tmp_path / "r.jsonl"), filters=[Filter(**rule)]), "train", "data.train")
    assert [row["level"] for _, row in rows.rows] == left
    assert rows.filtered == 10 - len(left)
    assert [place for place, _ in rows.rows] == [f"r.jsonl:{i + 1}" for i in left]


def test_rows_have_the_columns_of_all_rows_before_they_are_renamed_and_filtered(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": "b", "gold": 1, "level": 3}])
    changes = {"columns": {"answer": "gold"}, "filters": [{"column": "level", "at_least": 1}]}
    assert rows_of(path=str(tmp_path / "r.jsonl"), **changes) == [{"prompt": "b", "level": 3, "answer": 1}]
    assert rows_of(path=str(tmp_path / "r.jsonl"))[0] == {"prompt": "a", "gold": None, "level": None}


def test_a_row_without_a_value_does_not_pass(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "level": None}, {"prompt": "b", "level": 1}])
    filters = [{"column": "level", "at_least": 0}]
    assert [row["prompt"] for row in rows_of(path=str(tmp_path / "r.jsonl"), filters=filters)] == ["b"]


@pytest.mark.parametrize(
    ("filters", "code", "place"),
    [
        ([{"column": "levle", "at_least": 1}], "E202", "r.jsonl:1:levle"),
        ([{"column": "level", "at_least": 99}], "E203", "run.toml:data.train"),
        ([{"column": "prompt", "matches": "7"}, {"column": "level", "one_of": [3]}], "E203", "run.toml:data.train"),
        ([{"column": "pair", "at_least": 99}], "E206", "r.jsonl:1:pair"),
        ([{"column": "prompt", "matches": "*easy"}], "E102", "run.toml:data.train.filters[0].matches"),
    ],
)
def test_filters_that_make_no_sense(tmp_path, filters, code, place):
    write_rows(tmp_path / "r.jsonl", [row | {"pair": {"a": 1}} for row in ROWS])
    error = refused(path=str(tmp_path / "r.jsonl"), filters=filters)
    assert (error.code, error.place) == (code, place)


def test_the_first_rows_that_are_left(tmp_path):
    write_rows(tmp_path / "r.jsonl", ROWS)
    filters = [{"column": "level", "at_least": 4}]
    found = rows_of(path=str(tmp_path / "r.jsonl"), filters=filters, max_rows=2)
    assert [row["level"] for row in found] == [4, 5]


# --- mixtures ---


def test_several_sources_are_one_set_and_each_prompt_knows_its_own(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:3])
    write_rows(tmp_path / "b.jsonl", [{"question": "7+7=", "answer": "14", "level": 0}])
    second = Source(path=str(tmp_path / "b.jsonl"), columns={"prompt": "question"}, name="sums")
    sources = [Source(path=str(tmp_path / "a.jsonl")), second]
    loaded = PromptSet.load(make_config(), sources, "train", "data.train", make_tokenizer(TASKS["addition"]))
    assert [(p.prompt_id, p.source) for p in loaded.prompts] == [(0, "a"), (1, "a"), (2, "a"), (3, "sums")]
    assert loaded.mixture == []
    stream = loaded.stream(make_config())
    assert sorted(stream.at(i).prompt_id for i in range(4)) == [0, 1, 2, 3]


def test_all_sources_have_a_weight_or_none(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:3])
    sources = [Source(path=str(tmp_path / "a.jsonl"), weight=1.0), Source(path=str(tmp_path / "a.jsonl"))]
    with pytest.raises(InputError, match="E108"):
        PromptSet.load(make_config(), sources, "train", "data.train", make_tokenizer(TASKS["addition"]))


def order(stream: PromptStream, first: int, count: int) -> list[int]:
    return [stream.at(i).prompt_id for i in range(first, first + count)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_hold_in_every_epoch_and_rows_take_turns(shuffle):
    prompts = [make_prompt(i) for i in range(12)]  # 10 of the first source, 2 of the second, half and half.
    stream = PromptStream(prompts, 3, shuffle, [(10, 1.0), (2, 1.0)])
    epochs = [order(stream, 12 * e, 12) for e in range(5)]
    assert [sum(i < 10 for i in epoch) for epoch in epochs] == [6] * 5
    for after in range(1, 6):
        seen = Counter(i for epoch in epochs[:after] for i in epoch)
        first, second = [seen[i] for i in range(10)], [seen[i] for i in (10, 11)]
        assert max(first) - min(first) <= 1
        assert second == [3 * after, 3 * after]
    assert stream.epoch == 0.0


def test_without_shuffling_sources_are_interleaved_by_their_shares():
    stream = PromptStream([make_prompt(i) for i in range(8)], 0, False, [(4, 3.0), (4, 1.0)])
    assert order(stream, 0, 8) == [0, 1, 4, 2, 3, 0, 5, 1]  # Six of the first, two of the second.


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    start=st.integers(0, 60),
)
def test_a_mixture_goes_on_from_any_position_as_if_it_had_never_stopped(sizes, weights, seed, start):
    prompts = [make_prompt(i) for i in range(sum(sizes))]
    mixture = list(zip(sizes, weights, strict=False))
    whole, resumed = (PromptStream(prompts, seed, True, mixture) for _ in range(2))
    whole_order = order(whole, 0, 80)
    resumed.cursor = start
    assert [resumed.next()[1].prompt_id for _ in range(20)] == whole_order[start : start + 20]


def test_other_shares_are_other_data():
    prompts = [make_prompt(i) for i in range(12)]
    digests = {PromptStream(prompts, 0, True, m).digest for m in ([], [(6, 1.0), (6, 1.0)], [(6, 2.0), (6, 1.0)])}
    assert len(digests) == 2  # Equal shares of equal sizes are no other data.


def test_metrics_say_how_each_source_does():
    groups = [make_group(rewards=[1.0, 0.0], source="easy"), make_group(rewards=[0.0, 0.0], source="hard")]
    metrics = group_metrics(groups, 0)
    assert (metrics["source/easy/reward"], metrics["source/hard/reward"]) == (0.5, 0.0)
    assert "source/easy/reward" not in group_metrics(groups[:1], 0)
