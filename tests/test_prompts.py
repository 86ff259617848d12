"""Rows become prompts: the four file forms, row numbers, chat templates, dropping, order and resume."""

from __future__ import annotations

import csv
import json
from datetime import date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.builtin import CHAT, TASKS, make_tokenizer
from rollout import row_values
from rollout.datasets import read
from rollout.prompts import PromptSet, PromptStream
from shared.config_data import Source
from shared.errors import InputError, InputErrors
from tests.fakes import make_config, make_prompt, write_rows

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "3+3=", "answer": "6"}]


@pytest.fixture(scope="module")
def plain():
    """One token per character of 0123456789+=, no chat template."""
    return make_tokenizer(TASKS["addition"])


@pytest.fixture(scope="module")
def chat():
    """One token per byte, with a chat template."""
    return make_tokenizer(TASKS["gsm8k"])


def load(path, tokenizer, **changes) -> PromptSet:
    return PromptSet.load(make_config(**changes), [Source(path=str(path))], "train", "run.toml:data.train", tokenizer)


def refused(path, tokenizer=None, **changes) -> list[InputError]:
    """The problems of a file that must not load."""
    with pytest.raises((InputError, InputErrors)) as excinfo:
        load(path, tokenizer, **changes)
    return excinfo.value.problems if isinstance(excinfo.value, InputErrors) else [excinfo.value]


# --- files ---


def load_rows(path: str, key: str) -> list[dict]:
    return [row for _, row in read(Source(path=path), "train", key).rows]


def write(path, rows) -> None:
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_all_file_forms_give_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    write(path, ROWS)
    assert load_rows(str(path), "data.train") == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    "text", ["two\nlines", 'quotes " and, commas', "line\u2028separator", "form\x0cfeed", "日本 🎉"]
)
def test_no_text_is_altered_by_a_file_form(tmp_path, suffix, text):
    path = tmp_path / f"train.{suffix}"
    write(path, [{"prompt": text, "answer": "1"}, {"prompt": "last", "answer": "2"}])
    assert [row["prompt"] for row in load_rows(str(path), "data.train")] == [text, "last"]


def test_line_separators_inside_unescaped_json_strings_do_not_end_a_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n\n{"prompt": "d"}', encoding="utf-8")
    assert [row["prompt"] for row in load_rows(str(path), "data.train")] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "code", "place"),
    [
        ("train.jsonl", b"", "E203", "train.jsonl"),
        ("train.jsonl", b"\n \n", "E203", "train.jsonl"),
        ("train.json", b"[]", "E203", "train.json"),
        ("train.csv", b"prompt,answer\n", "E203", "train.csv"),
        ("train.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b', "E204", "train.jsonl:3"),
        ("train.jsonl", b'{"prompt": "a"}\n[1]\n', "E204", "train.jsonl:2"),
        ("train.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}]', "E204", "train.json:3"),
        ("train.json", b'{"prompt": "a"}', "E204", "train.json"),
        ("train.parquet", b"PAR1 no", "E204", "train.parquet"),
        ("train.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "E205", "train.jsonl:2"),
        ("train.csv", b"prompt\ncaf\xe9\n", "E205", "train.csv:2"),
        ("train.jsonl", b'{"answer": 1}\n{"answer": "2"}\n', "E206", "train.jsonl:answer"),
        ("train.jsonl", b'{"answer": [1]}\n{"answer": {}}\n', "E206", "train.jsonl:answer"),
        ("train.py", b"", "E210", "data.train"),
        ("train.txt", b"", "E201", "data.train"),
    ],
)
def test_a_broken_file_is_refused_at_its_line(tmp_path, name, content, code, place):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as excinfo:
        load_rows(str(path), "data.train")
    assert (excinfo.value.code, excinfo.value.place) == (code, place)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError) as excinfo:
        load_rows(str(tmp_path / "trian.jsonl"), "run.toml:data.train")
    assert (excinfo.value.code, excinfo.value.place) == ("E201", "run.toml:data.train")
    assert "train.jsonl" in excinfo.value.fix


def test_nulls_and_mixed_numbers_are_one_type(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"n": None}, {"n": 1}, {"n": 0.5}, {}])
    assert len(load_rows(str(path), "data.train")) == 4


# --- values ---

ODD = {
    "price": pyarrow.array([Decimal("18.90"), None], pyarrow.decimal128(10, 2)),
    "count": pyarrow.array([Decimal("7"), Decimal("-3")], pyarrow.decimal128(38, 9)),
    "took": pyarrow.array([timedelta(seconds=90), None], pyarrow.duration("us")),
    "when": pyarrow.array([datetime(2026, 11, 28, 9, 5), None], pyarrow.timestamp("us")),
    "day": pyarrow.array([date(2026, 11, 28), None]),
    "text": pyarrow.array([b"caf\xc3\xa9", None]),
    "raw": pyarrow.array([b"caf\xc3\xa9", b"\xff"]),
    "share": pyarrow.array([float("nan"), 0.5]),
    "half": pyarrow.array([1.5, None], pyarrow.float16()),
    "kind": pyarrow.array(["a", "b"]).dictionary_encode(),
    "pairs": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "nested": pyarrow.array([{"prices": [Decimal("0.10")]}, None]),
    "id": pyarrow.array([bytes(16), None], pyarrow.uuid()),
}
PLAIN = {
    "price": [18.9, None],
    "count": [7, -3],
    "took": ["0:01:30", None],
    "when": ["2026-11-28T09:05:00", None],
    "day": ["2026-11-28", None],
    "text": ["café", None],
    "raw": [b"caf\xc3\xa9", b"\xff"],
    "share": [None, 0.5],
    "half": [1.5, None],
    "kind": ["a", "b"],
    "pairs": [[["a", 1]], []],
    "nested": [{"prices": [0.1]}, None],
    "id": ["00000000-0000-0000-0000-000000000000", None],
}


@pytest.mark.parametrize("column", ODD)
def test_values_of_parquet_become_text_and_numbers(tmp_path, plain, column):
    path = tmp_path / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1", "2"], column: ODD[column]}), path)
    values = [row[column] for row in load_rows(str(path), "data.train")]
    assert values == PLAIN[column]
    assert list(map(type, values)) == list(map(type, PLAIN[column]))
    assert [prompt.columns[column] for prompt in load(path, plain).prompts] == values
    json.dumps(values, default=row_values.plain)


def test_values_that_are_not_numbers_of_json_are_no_values(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1", "x": NaN, "y": {"z": [NaN, 1e999]}}\n')
    assert load_rows(str(path), "k") == [{"prompt": "1", "x": None, "y": {"z": [None, float("inf")]}}]


@pytest.mark.parametrize(
    ("name", "content", "code", "place", "found"),
    [
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": "half \\ud83d"}', "E205", "a.jsonl:2", "half a character (\\ud83d) in prompt"),
        ("a.jsonl", '{"x": [{"\\udc00": 1}]}', "E205", "a.jsonl:1", "half a character (\\udc00) in x"),
        ("a.json", '[{"x": ["\\ud83d\\ud83d\\ude00"]}]', "E205", "a.json:1", "half a character (\\ud83d) in x"),
        ("a.jsonl", '{"x": ' + "9" * 5000 + "}", "E204", "a.jsonl:1", "a number with thousands of digits"),
        ("a.csv", "prompt,answer,answer\n1,2,3\n", "E204", "a.csv:answer", "answer twice"),
    ],
)  # fmt: skip
def test_values_that_no_library_takes_are_refused_with_row_and_column(tmp_path, name, content, code, place, found):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as excinfo:
        load_rows(str(tmp_path / name), "k")
    assert (excinfo.value.code, excinfo.value.place, excinfo.value.found) == (code, place, found)


def test_whole_pairs_and_trailing_columns_without_a_name_are_no_faults(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": "\\ud83d\\ude00"}')
    assert load_rows(str(tmp_path / "a.jsonl"), "k") == [{"x": "\U0001f600"}]
    (tmp_path / "a.csv").write_text("prompt,,\n1,,\n")
    assert load_rows(str(tmp_path / "a.csv"), "k") == [{"prompt": "1", "": ""}]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (pyarrow.array([Decimal("1.5"), Decimal("0.12345678901234567891")]), "the decimal 0.12345678901234567891 in x"),
        (pyarrow.array([None, 2**59], pyarrow.timestamp("us")), "timestamp[us] in x: "),
        (pyarrow.array([None, 1], pyarrow.timestamp("ns")), "timestamp[ns] in x: "),
    ],
)
def test_values_of_parquet_without_a_plain_form_are_refused_with_row_and_column(tmp_path, value, found):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1", "2"], "x": value}), tmp_path / "a.parquet")
    with pytest.raises(InputError) as excinfo:
        load_rows(str(tmp_path / "a.parquet"), "k")
    assert (excinfo.value.code, excinfo.value.place) == ("E206", "a.parquet:2")
    assert excinfo.value.found.startswith(found)


# --- prompts ---


def test_a_row_becomes_ids_text_and_columns(tmp_path, plain):
    rows = [{"prompt": "1+2=", "answer": "3", "level": 1, "completion": "3"}]
    (prompt,) = load(write_rows(tmp_path / "a.jsonl", rows), plain).prompts
    assert (prompt.prompt_id, prompt.text) == (0, "1+2=")
    assert prompt.token_ids.dtype == np.int32
    assert plain.decode(prompt.token_ids.tolist()) == "1+2="
    assert prompt.columns == {"answer": "3", "level": 1}


def test_a_missing_column_names_the_columns_there_are(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "1+1=", "answer": "2"}])
    (error,) = refused(path, plain)
    assert (error.code, error.place) == ("E202", "a.jsonl:prompt")
    assert "question, answer" in error.found
    assert error.fix == 'data.prompt_column = "question"'


def test_a_prompt_missing_in_a_row_is_a_blank_one(tmp_path, plain):
    for rows, place in (([{"prompt": "1"}, {"answer": "2"}], "a.jsonl:2"), ([{}, {"prompt": "1"}], "a.jsonl:1")):
        (error,) = refused(write_rows(tmp_path / "a.jsonl", rows), plain)
        assert (error.code, error.place) == ("E207", place)


def test_all_prompts_have_the_columns_of_all_rows_of_all_sources(tmp_path, plain):
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": "1"}, {"prompt": "2", "answer": "2"}])
    second = write_rows(tmp_path / "b.jsonl", [{"prompt": "3", "level": 1}])
    sources = [Source(path=str(first)), Source(path=str(second))]
    loaded = PromptSet.load(make_config(), sources, "train", "data.train", plain)
    assert loaded.columns == ["answer", "level"]
    nothing = {"answer": None, "level": None}
    assert [p.columns for p in loaded.prompts] == [nothing, nothing | {"answer": "2"}, nothing | {"level": 1}]


MIXED = [{"prompt": p} for p in ("1+1=", "", "  ", "1" * 16, "1" * 17, "1" * 40, None)]


def test_blank_and_long_prompts_are_refused_together(tmp_path, plain):
    blank, long = refused(write_rows(tmp_path / "a.jsonl", MIXED), plain)
    assert (blank.code, blank.place, blank.found) == ("E207", "a.jsonl:2 (and 2 more)", "3 empty prompts")
    assert (long.code, long.place, long.found) == ("E208", "a.jsonl:5 (and 1 more)", "up to 40 tokens")


def test_blank_and_long_prompts_are_dropped_and_counted_on_request(tmp_path, plain):
    drop = {"data.on_bad_row": "drop", "data.on_long_prompt": "drop"}
    loaded = load(write_rows(tmp_path / "a.jsonl", MIXED), plain, **drop)
    assert loaded.dropped == {"blank": 3, "long": 2, "filtered": 0}
    # The rows that stay keep their numbers, and a prompt of exactly the limit is whole.
    assert [(p.prompt_id, len(p.token_ids)) for p in loaded.prompts] == [(0, 4), (3, 16)]


def test_dropping_one_kind_still_refuses_the_other(tmp_path, plain):
    path = write_rows(tmp_path / "a.jsonl", MIXED)
    assert [e.code for e in refused(path, plain, **{"data.on_bad_row": "drop"})] == ["E208"]
    assert [e.code for e in refused(path, plain, **{"data.on_long_prompt": "drop"})] == ["E207"]


def test_rows_are_numbered_as_the_file_counts_them(tmp_path, plain):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1"}\n\n\n{"prompt": ""}\n')
    (error,) = refused(path, plain)
    assert error.place == "a.jsonl:4"


def test_a_prompt_that_is_no_text_is_an_input_error(tmp_path, plain):
    assert refused(write_rows(tmp_path / "a.jsonl", [{"prompt": 5}]), plain)


# --- chat ---


def test_a_string_is_wrapped_only_when_chat_is_on(tmp_path, chat):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    (prompt,) = load(path, chat).prompts
    assert (prompt.text, chat.decode(prompt.token_ids.tolist())) == ("hi", "hi")
    (prompt,) = load(path, chat, **{"data.chat": True}).prompts
    assert prompt.text == [{"role": "user", "content": "hi"}]
    assert chat.decode(prompt.token_ids.tolist()) == "<|user|>hi<|assistant|>"
    # The role marks are single tokens: one per mark and one per byte.
    assert len(prompt.token_ids) == 4


def test_messages_are_rendered_after_the_system_prompt(tmp_path, chat):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": [*messages, messages[0]]}])
    (prompt,) = load(path, chat, **{"data.system_prompt": "s"}).prompts
    assert prompt.text == [{"role": "system", "content": "s"}, *messages, messages[0]]
    assert chat.decode(prompt.token_ids.tolist()) == "<|system|>s<|user|>a<|assistant|>b<|user|>a<|assistant|>"


def test_rewards_see_contents_as_text_and_no_keys_without_a_value(tmp_path, chat):
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": content, "name": None}]}])
    assert load(path, chat).prompts[0].text == [{"role": "user", "content": "a\nb"}]


def test_the_configured_template_replaces_the_tokenizers(tmp_path, chat, plain):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "1+1="}])
    changes = {"data.chat": True, "model.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}0"}
    for tokenizer in (chat, plain):
        (prompt,) = load(path, tokenizer, **changes).prompts
        assert tokenizer.decode(prompt.token_ids.tolist()) == "1+1=0"


@pytest.mark.parametrize("prompt", ["1+1=", [{"role": "user", "content": "1+1="}]])
def test_messages_without_a_template_are_e403(tmp_path, plain, prompt):
    (error,) = refused(write_rows(tmp_path / "a.jsonl", [{"prompt": prompt}]), plain, **{"data.chat": True})
    assert error.code == "E403"
    assert "model.tokenizer" in error.place
    assert "a.jsonl:1" in error.found


def test_a_system_prompt_that_no_text_would_get_is_refused(tmp_path, plain):
    (error,) = refused(write_rows(tmp_path / "a.jsonl", [{"prompt": "1+1="}]), plain, **{"data.system_prompt": "s"})
    assert (error.code, error.place) == ("E108", "run.toml:data.system_prompt, data.chat")


def test_the_template_of_the_builtin_task_is_the_one_tested(chat):
    assert chat.chat_template == CHAT


# --- order ---


def ids(stream: PromptStream, count: int) -> list[int]:
    return [stream.next()[1].prompt_id for _ in range(count)]


@settings(derandomize=True)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**31), cut=st.integers(0, 40))
def test_every_row_once_an_epoch_and_exact_resume(size, seed, cut):
    prompts = [make_prompt(i) for i in range(size)]
    whole = ids(PromptStream(prompts, seed), 4 * size)
    for epoch in range(4):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    cut = min(cut, 4 * size)
    resumed = PromptStream(prompts, seed)
    resumed.cursor = cut
    assert ids(resumed, 4 * size - cut) == whole[cut:]


def test_the_order_depends_on_seed_and_epoch():
    prompts = [make_prompt(i) for i in range(32)]
    first, again, other = (ids(PromptStream(prompts, seed), 64) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first[:32] != first[32:]


def test_without_shuffling_rows_come_in_file_order():
    stream = PromptStream([make_prompt(i) for i in range(3)], 5, shuffle=False)
    assert ids(stream, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_group_ids_count_up_and_looking_does_not_move():
    stream = PromptStream([make_prompt(i) for i in range(2)], 0)
    seen = []
    for expected in range(5):
        assert stream.cursor == expected
        prompt = stream.at(stream.cursor)
        group_id, taken = stream.next()
        assert taken is prompt
        seen.append(group_id)
    assert seen == [0, 1, 2, 3, 4]
    assert (len(stream), stream.epoch) == (2, 2.5)
