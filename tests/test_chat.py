"""Messages become prompts by templates in the manner of those that models ship with: nothing is lost, nothing is closed."""

from __future__ import annotations

import datetime
import json

import pytest
from tokenizers import processors

from launch.builtin import TASKS, make_tokenizer
from rollout.prompts import PromptSet
from shared.config_data import Source
from shared.errors import InputError, InputErrors
from tests.chat_templates import ALL, CHATML, DATED, REASONING, THINKING
from tests.fakes import make_config, write_rows

ASKED = "Why is 2+2 four?"
CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome", "day": None}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": None, "parameters": {"type": "object"}}}]


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def system(content) -> dict:
    return {"role": "system", "content": content}


FORMS = {
    "a question": [user(ASKED)],
    "a system message": [system("Speak in rhymes."), user(ASKED)],
    "several turns": [user("hello there"), assistant("good day"), user(ASKED)],
    "text parts": [user([{"type": "text", "text": "Look:"}, {"type": "text", "text": ASKED}])],
    "keys without a value": [user(ASKED) | {"tool_calls": None, "name": None}],
    "reasoning before": [user("hello there"), assistant("<think>hmm</think>\n\ngood day"), user(ASKED)],
    "blanks around": [user(f"  {ASKED} \n")],
    "a short question": [user("1")],
    "quotes and brackets": [user('say "a"\nthen <b>')],
    "flags": [system("Speak. /no_think"), user(ASKED)],
    "an empty turn at the end": [user(ASKED), assistant("")],
}
NO_SYSTEM = {("alternating", "a system message"), ("alternating", "flags")}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    return make_tokenizer(TASKS["gsm8k"])


@pytest.fixture
def load(tmp_path, tokenizer):
    """``load(template, messages, row={}, **settings)``: the set of one row."""

    def loaded(template, messages, row=None, **settings) -> PromptSet:
        tokenizer.chat_template = template
        path = write_rows(tmp_path / "r.jsonl", [{"prompt": messages, **(row or {})}])
        config = make_config(**{"rollout.max_prompt_tokens": 2000} | settings)
        return PromptSet.load(config, [Source(path=str(path))], "train", "run.toml:data.train", tokenizer)

    return loaded


@pytest.fixture
def text(load, tokenizer):
    """``text(template, messages, ...)``: the prompt of one row, as text."""
    return lambda *row, **settings: tokenizer.decode(load(*row, **settings).prompts[0].token_ids.tolist())


@pytest.fixture
def refusal(load):
    """``refusal(template, messages, ...)``: the one error of a row."""

    def refused(*row, **settings) -> InputError:
        with pytest.raises((InputError, InputErrors)) as excinfo:
            load(*row, **settings)
        (error,) = getattr(excinfo.value, "problems", [excinfo.value])
        assert "\n" not in str(error)
        return error

    return refused


# --- nothing is lost ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_the_question_is_in_the_prompt_whatever_form_the_messages_have(text, refusal, name, form):
    messages = FORMS[form]
    if (name, form) in NO_SYSTEM:
        assert refusal(ALL[name], messages).code == "E403"
        return
    prompt = text(ALL[name], messages)
    question = messages[-1]["content"] or messages[-2]["content"]
    asked = ASKED if isinstance(question, list) else question.strip()
    assert asked in prompt
    assert not any(odd in prompt for odd in ("None", "'type'", '"type"', "null", "qzmark"))
    assert prompt.count(asked) == 1 or len(asked) == 1


@pytest.mark.parametrize("name", ALL)
def test_parts_are_joined_by_a_new_line(text, name):
    assert f"Look:\n{ASKED}" in text(ALL[name], FORMS["text parts"])


@pytest.mark.parametrize("part", ["image", "image_url", "input_audio", "video", "file"])
def test_a_part_that_is_no_text_is_refused_with_its_row(refusal, part):
    error = refusal(CHATML, [system("s"), user([{"type": part, part: {"url": "x"}}, {"type": "text", "text": ASKED}])])
    assert (error.code, error.place, error.found) == ("E206", "r.jsonl:1", f"{part} in message 2")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"from": "human", "value": ASKED}], "message 1 with from, value"),
        ([ASKED], "str"),
        ([user(5)], "int in message 1"),
        ([user({"text": ASKED})], "dict in message 1"),
        ([user([{"type": "text", "text": None}])], "a part without text in message 1"),
        ([user([5])], "a part without text in message 1"),
    ],
)
def test_what_is_no_message_of_text_is_refused_with_its_row(refusal, messages, found):
    error = refusal(CHATML, messages)
    assert (error.code, error.place, error.found) == ("E206", "r.jsonl:1", found)


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"type": "text", "text": ""}]])
def test_a_conversation_that_asks_nothing_is_a_blank_prompt(refusal, content):
    assert refusal(CHATML, [system("s"), user(content)]).code == "E207"


LAST_ONLY = "{{ messages[-1].content }}"
NO_SYSTEM_SHOWN = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


def test_a_template_that_drops_the_question_is_refused_also_where_its_text_is_there_by_chance(refusal):
    fixed = "Item 1 of the list.{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    error = refusal(fixed, [user("1")])
    assert (error.code, error.place) == ("E403", "run.toml:model.tokenizer")
    assert error.found == "no text of message 1 (user) in the prompt of r.jsonl:1"
    cut = refusal("{{ messages[-1].content[:20] }}", [user("What is 17 times 23, and why?")])
    assert cut.found == "no text of message 1 (user) in the prompt of r.jsonl:1"


def test_a_role_that_a_template_does_not_know_is_refused_where_it_asks(refusal):
    error = refusal(ALL["role tags"], [{"role": "human", "content": ASKED}])
    assert error.found == "no text of message 1 (human) in the prompt of r.jsonl:1"


def test_a_system_prompt_that_a_template_drops_is_refused_as_a_setting_and_told_as_a_rows(load, refusal):
    error = refusal(NO_SYSTEM_SHOWN, [user(ASKED)], **{"data.system_prompt": "Rhyme."})
    assert error.found == "no text of data.system_prompt in the prompt of r.jsonl:1"
    told = load(NO_SYSTEM_SHOWN, [system("Rhyme."), user(ASKED)]).warnings
    assert told == [
        "warning[W211] the chat template leaves out system messages — r.jsonl:1. "
        "Found them in the row and not in its prompt, expected both."
    ]


def test_earlier_turns_that_a_template_drops_are_told_and_reasoning_is_not(load):
    assert load(THINKING, FORMS["reasoning before"]).warnings == []
    (user_line, assistant_line) = load(LAST_ONLY, FORMS["several turns"]).warnings
    assert "leaves out user messages" in user_line
    assert "leaves out assistant messages" in assistant_line


def test_rows_that_lose_something_are_counted(tmp_path, tokenizer):
    tokenizer.chat_template = NO_SYSTEM_SHOWN
    messages = [[system(f"Rhyme {i}."), user(f"{ASKED} {i}")] for i in range(3)] + [[user("And now?")]]
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": m} for m in messages])
    config = make_config(**{"rollout.max_prompt_tokens": 99})
    (line,) = PromptSet.load(config, [Source(path=str(path))], "train", "data.train", tokenizer).warnings
    assert "r.jsonl:1 (and 2 more)" in line


# --- the last turn is the model's ---

BEGUN = "Let me think.\n<think>"


@pytest.mark.parametrize("begun", [BEGUN, "Answer: ", "So:\n\n", "It is 1"])
@pytest.mark.parametrize("name", ALL)
def test_a_prompt_that_ends_with_an_assistant_turn_is_continued(text, name, begun):
    prompt = text(ALL[name], [user(ASKED), assistant(begun)])
    assert prompt.endswith(begun)
    assert ASKED in prompt


@pytest.mark.parametrize("name", ALL)
def test_a_continued_prompt_is_what_transformers_makes_but_for_blanks_at_its_end(text, tokenizer, name):
    messages = [user(ASKED), assistant(BEGUN)]
    prompt = text(ALL[name], messages)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert prompt == expected


def test_a_turn_of_which_a_template_drops_a_part_cannot_be_continued(refusal, text):
    reasoned = [user(ASKED), assistant("<think>easy</think>\nIt is")]
    error = refusal(REASONING, reasoned)
    assert (error.code, error.what) == ("E403", "prompt cannot be continued")
    assert "r.jsonl:1" in error.found
    assert text(THINKING, reasoned).endswith("easy\n</think>\n\nIt is")


def test_a_call_of_a_tool_cannot_be_continued(refusal):
    error = refusal(CHATML, [user(ASKED), assistant("Wait:", tool_calls=CALLS)])
    assert (error.code, error.found) == ("E403", "calls of tools at the end of r.jsonl:1")


def test_a_template_that_says_the_last_turn_twice_or_never_cannot_continue_it(refusal):
    for template in (NO_SYSTEM_SHOWN + "{{ messages[-1].content }}", "{{ messages[0].content }}"):
        assert refusal(template, [user(ASKED), assistant(BEGUN)]).what == "prompt cannot be continued"


# --- tools and variables of a row ---

CALLING = [user(ASKED), assistant(None, tool_calls=CALLS), {"role": "tool", "name": "look_up", "content": '{"t": 21}'}]


@pytest.mark.parametrize("name", ["chatml", "thinking", "dated", "reasoning", "channels", "parts", "named"])
def test_calls_and_their_results_are_shown_without_the_keys_that_have_no_value(text, name):
    prompt = text(ALL[name], CALLING, {"tools": TOOLS if name in ("chatml", "dated", "named") else None})
    assert "look_up" in prompt
    assert "21" in prompt
    assert "None" not in prompt
    assert "null" not in prompt


@pytest.mark.parametrize("form", [lambda tools: tools, json.dumps])
def test_the_tools_of_a_row_go_to_the_template_and_stay_a_column(load, text, form):
    (prompt,) = load(CHATML, [user(ASKED)], {"tools": form(TOOLS)}).prompts
    assert prompt.columns["tools"] == form(TOOLS)
    shown = text(CHATML, [user(ASKED)], {"tools": form(TOOLS)})
    assert '{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}' in shown


def test_the_variables_of_a_row_go_to_the_template_and_stay_a_column(load, text):
    row = {"chat_template_kwargs": {"enable_thinking": False, "unset": None}}
    assert text(THINKING, [user(ASKED)], row).endswith("<think>\n\n</think>\n\n")
    assert text(THINKING, [user(ASKED)]).endswith("assistant\n")
    loaded = load(THINKING, [user(ASKED)], row)
    assert loaded.warnings == []
    assert loaded.prompts[0].columns == row


def test_tools_and_variables_that_a_template_does_not_know_are_told(load):
    row = {"chat_template_kwargs": {"enable_thinking": False}, "tools": TOOLS}
    assert [line.partition(" — ")[0] for line in load(ALL["json content"], [user(ASKED)], row).warnings] == [
        "warning[W211] the chat template leaves out the column tools",
        "warning[W211] the chat template leaves out chat_template_kwargs.enable_thinking",
    ]


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"tools": ["hammer"]}, "r.jsonl:1:tools"),
        ({"tools": "hammer"}, "r.jsonl:1:tools"),
        ({"chat_template_kwargs": ["x"]}, "r.jsonl:1:chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "r.jsonl:1:chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "r.jsonl:1:chat_template_kwargs"),
    ],
)
def test_tools_and_variables_that_are_none_are_refused(refusal, row, place):
    error = refusal(CHATML, [user(ASKED)], row)
    assert (error.code, error.place) == ("E206", place)


# --- which template ---


def test_of_several_templates_the_default_is_taken_and_that_for_tools_where_there_are_tools(text):
    assert text(ALL["named"], [user(ASKED)]).startswith("<|user|>")
    assert text(ALL["named"], [user(ASKED)], {"tools": TOOLS}).startswith("<|im_start|>")
    assert text(ALL["named"], [user(ASKED)], **{"model.chat_template": "tool_use"}).startswith("<|im_start|>")


def test_several_templates_without_a_default_are_listed(refusal, text):
    named = {"rag": "{{ messages[0].content }}", "tool_use": CHATML}
    error = refusal(named, [user(ASKED)])
    assert (error.code, error.place, error.found) == ("E403", "run.toml:model.tokenizer", "templates rag, tool_use")
    assert error.fix.startswith('model.chat_template = "rag"')
    assert text(named, [user(ASKED)], **{"model.chat_template": "rag"}) == ASKED
    error = refusal(named, [user(ASKED)], **{"model.chat_template": "rug"})
    assert (error.code, error.found, error.fix) == ("E403", '"rug"', 'model.chat_template = "rag"')


def test_templates_are_found_in_all_files_where_model_folders_keep_them(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    shown = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    folders = {
        "list": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": shown}]}},
        "jinja": {"chat_template.jinja": shown},
        "more": {"chat_template.jinja": shown, "additional_chat_templates/rag.jinja": "x"},
        "processor": {"chat_template.json": {"chat_template": shown}},
    }
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": [user(ASKED)]}])
    for name, files in folders.items():
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path / name)
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            if file == "tokenizer_config.json":
                content = json.loads((tmp_path / name / file).read_text()) | content
            (tmp_path / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
        found = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        config = make_config(**{"rollout.max_prompt_tokens": 99, "model.path": str(tmp_path / name)})
        (prompt,) = PromptSet.load(config, [Source(path=str(path))], "train", "data.train", found).prompts
        assert found.decode(prompt.token_ids.tolist()) == f"[{ASKED}]", name


def test_a_broken_file_of_a_template_is_one_line(tmp_path, refusal):
    (tmp_path / "chat_template.json").write_text('{"chat": 1}')
    error = refusal(None, [user(ASKED)], **{"model.path": str(tmp_path)})
    assert (error.code, error.place) == ("E403", "run.toml:model.tokenizer")
    assert "chat_template.json" in error.found


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ [] + {} }}", "{{ x() }}"]
)
def test_whatever_a_template_runs_into_is_one_line_that_names_the_row(refusal, template):
    error = refusal(None, [user(ASKED)], **{"model.chat_template": template})
    assert (error.code, error.place) == ("E403", "run.toml:model.chat_template")
    assert error.found.endswith("for r.jsonl:1")


# --- the date ---


def test_a_template_is_told_the_day_that_is_set_and_never_the_clocks(load, text, monkeypatch):
    for clock in ("2031-01-01", "2032-02-02"):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=clock):
                return cls.fromisoformat(day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        prompt = text(DATED, [user(ASKED)], **{"data.date": "2026-11-28"})
        assert "Today Date: 28 Nov 2026" in prompt
    assert "Today Date: 1 May" in text(DATED, [user(ASKED)], {"chat_template_kwargs": {"date_string": "1 May"}})
    (line,) = load(DATED, [user(ASKED)], **{"data.date": "2026-11-28"}).warnings
    assert line.startswith("warning[W212] the chat template asks for today's date — run.toml:data.date.")
    assert "2026-11-28" in line
    assert load(CHATML, [user(ASKED)]).warnings == []


# --- tokens at the ends ---


@pytest.fixture
def ending():
    """A tokenizer that puts <|user|> before every text, and <|end|> behind it."""
    tokenizer = make_tokenizer(TASKS["gsm8k"])
    first, last = (tokenizer.convert_tokens_to_ids(name) for name in ("<|user|>", "<|end|>"))
    pieces = {"single": "<|user|> $A <|end|>", "special_tokens": [("<|user|>", first), ("<|end|>", last)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**pieces)
    assert tokenizer.decode(tokenizer("hi")["input_ids"]) == "<|user|>hi<|end|>"
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", "<|user|>hi"),
        ("<|user|>hi", "<|user|>hi"),
        ("<|user|><|user|>hi", "<|user|><|user|>hi"),
        ("hi<|end|>", "<|user|>hi<|end|>"),
        ([user("hi")], "<|user|>hi"),
    ],
)
def test_the_first_token_comes_once_and_no_end_token_is_added(tmp_path, ending, prompt, expected):
    ending.chat_template = "<|user|>{{ messages[0].content }}"
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": prompt}])
    loaded = PromptSet.load(make_config(), [Source(path=str(path))], "train", "run.toml:data.train", ending)
    assert ending.decode(loaded.prompts[0].token_ids.tolist()) == expected
    told = [] if isinstance(prompt, list) else [
        "warning[W213] end token left off prompts — run.toml:model.tokenizer. "
        "Found <|end|> behind every text, expected nothing behind a prompt."
    ]  # fmt: skip
    assert loaded.warnings == told
