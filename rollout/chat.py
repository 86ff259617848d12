"""Messages become prompt text by a chat template: which template, on which day, and what it must not lose.

``prompts.py`` makes one ``ChatTemplate`` for all rows of a setting. Invariants: text of the last user message is in the
prompt; a prompt that ends with an assistant turn is continued, not closed; the clock changes no prompt.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

from rollout.messages import Message
from shared.config import Config
from shared.errors import InputError, nearest, one_line

MARK = "qzmarkzq"
"""A word that no template knows: where it comes out says what a template does with a text."""


class ChatTemplate:
    """The chat template of a configuration, and what it left out of the prompts so far."""

    def __init__(self, config: Config, tokenizer: Any, origin: str) -> None:
        """``origin``: the configuration's file, as messages name it. Raises ``InputError`` E403 for a broken file."""
        self._tokenizer, self._origin = tokenizer, origin
        self._system = bool(config.data.system_prompt)
        self._key = f"{origin}model.{'chat_template' if config.model.chat_template else 'tokenizer'}"
        self._templates, self._chosen = _templates(config, tokenizer, self._key)
        self._day = datetime.fromisoformat(config.data.date or date.today().isoformat())
        self._asked_day = False
        self._shapes: set[tuple[str, ...]] = set()
        self._lost: dict[str, list[str]] = {}

    def render(self, messages: list[Message], tools: Any, options: dict[str, Any], place: str) -> str:
        """The prompt's text, ready for the answer's first token. Raises ``InputError`` E403 naming ``place``."""
        template = self._template(tools, place)
        given = {"tools": tools, "chat_template": template, **options}
        if messages[-1]["role"] == "assistant" and (messages[-1]["content"] or "tool_calls" in messages[-1]):
            return self._continued(messages, given, place)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # An empty turn is what the generation prompt opens.
        text = self._rendered(messages, given, place)
        if self._calls_lost(messages, text):
            text = self._with_calls(messages, given, place) or text
        self._check(messages, text, given, place)
        return text

    def _with_calls(self, messages: list[Message], given: dict[str, Any], place: str) -> str:
        """The text where calls of tools are shown beside a content of none only; empty if that does not help."""
        emptied = [m | {"content": m["content"] or None} if "tool_calls" in m else m for m in messages]
        try:
            text = self._rendered(emptied, given, place)
        except InputError:
            return ""
        return "" if self._calls_lost(messages, text) else text

    def warnings(self) -> list[str]:
        """What was noticed in all prompts so far, one line each."""
        lines = []
        for what, places in self._lost.items():
            more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
            found = "Found them in the row and not in its prompt, expected both."
            lines.append(f"warning[W211] the chat template leaves out {what} — {places[0]}{more}. {found}")
        if self._asked_day:
            said = f"All prompts of the run say {self._day:%Y-%m-%d}, also when it is resumed on another day."
            lines.append(f"warning[W212] the chat template asks for today's date — {self._origin}data.date. {said}")
        return lines

    def _template(self, tools: Any, place: str) -> str:
        """The text of the template for a row. Raises ``InputError`` E403 if there is none, or none is the default."""
        if self._chosen:
            return self._chosen
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name in self._templates:
            return self._templates[name]
        if self._templates:
            names = ", ".join(self._templates)
            expected, fix = "one called default", f'model.chat_template = "{next(iter(self._templates))}", or another'
            raise InputError("E403", "no default chat template", self._key, f"templates {names}", expected, fix)
        expected, fix = "a template or plain prompts", "set model.chat_template"
        raise InputError("E403", "no chat template", self._key, f"messages in {place}", expected, fix)

    def _rendered(self, messages: list[Message], given: dict[str, Any], place: str, open_turn: bool = True) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=open_turn, tokenize=False, strftime_now=self._today, **given
                )
            )
        except Exception as error:  # What a template runs into when it meets contents that it cannot take.
            found, expected = f"{one_line(error)} for {place}", "a template for these messages"
            fix = "change the messages, or model.chat_template"
            raise InputError("E403", "chat template failed", self._key, found, expected, fix) from None

    def _today(self, form: str) -> str:
        """The run's day in place of today's, for templates."""
        self._asked_day = True
        return self._day.strftime(form)

    def _continued(self, messages: list[Message], given: dict[str, Any], place: str) -> str:
        """The text up to the end of the last turn, whatever the template puts behind it.

        The mark also keeps blanks at the end of the turn from being trimmed.
        """
        *before, last = messages
        text = str(last["content"])
        what, expected = "prompt cannot be continued", "the whole last turn at the prompt's end"
        if "tool_calls" in last:
            found, fix = f"calls of tools at the end of {place}", "end it with their results, or with text"
            raise InputError("E403", what, self._key, found, expected, fix)
        marked = self._rendered([*before, last | {"content": text + MARK}], given, place, open_turn=False)
        prompt, mark, _ = marked.partition(MARK)
        if not mark or marked.count(MARK) > 1 or not _squeezed(prompt).endswith(_squeezed(text)):
            found = f"a template that changes or leaves out the last assistant turn of {place}"
            raise InputError("E403", what, self._key, found, expected, "end the prompt with a user turn")
        self._check(before, prompt, given, place)
        return prompt

    def _check(self, messages: list[Message], text: str, given: dict[str, Any], place: str) -> None:
        """Note what of a row is not in ``text``. Raises ``InputError`` E403 if it is what the row asks."""
        needed = {max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)}
        needed |= {0} if self._system else set()
        needed |= {len(messages) - 1} if messages and messages[-1]["role"] != "assistant" else set()
        for i in self._messages_lost(messages, text, given, place):
            role = messages[i]["role"]
            if i in needed:
                which = "data.system_prompt" if self._system and i == 0 else f"message {i + 1 - self._system} ({role})"
                found, expected = f"no text of {which} in the prompt of {place}", "all that it says"
                fix = "change the messages, or model.chat_template"
                raise InputError("E403", "chat template drops text", self._key, found, expected, fix)
            self._note(f"{role} messages", place)
        if self._calls_lost(messages, text):
            self._note("calls of tools", place)
        if given["tools"] and any(name not in text for name in _names(given["tools"])):
            self._note("the column tools", place)
        for name in given.keys() - {"tools", "chat_template"}:
            if name not in given["chat_template"]:
                self._note(f"chat_template_kwargs.{name}", place)

    def _note(self, what: str, place: str) -> None:
        places = self._lost.setdefault(what, [])
        if places[-1:] != [place]:
            places.append(place)

    def _messages_lost(self, messages: list[Message], text: str, given: dict[str, Any], place: str) -> list[int]:
        """Numbers of the messages whose text has no place in ``text``.

        A text that is not there word for word, or a new order of roles, is tried with marks around it: templates may
        trim or quote what they show. Of an assistant's turn only the end counts, for reasoning is rightly left out.
        """
        contents = {i: m["content"] for i, m in enumerate(messages) if isinstance(m["content"], str)}
        shape = (*(f"{m['role']} {sorted(m)}" for m in messages), str(bool(given["tools"])))
        new = shape not in self._shapes
        self._shapes.add(shape)
        doubtful = {
            i: content
            for i, content in contents.items()
            if content.strip() and (new or not _shown(content, messages[i]["role"], text))
        }
        if not doubtful:
            return []
        marked = [
            m | {"content": f"{MARK}{i}a {doubtful[i]} {MARK}{i}z"} if i in doubtful else m
            for i, m in enumerate(messages)
        ]
        try:
            probe = self._rendered(marked, given, place)
        except InputError:  # A template that takes these words only.
            return [i for i, content in doubtful.items() if not _shown(content, messages[i]["role"], text)]
        return [
            i
            for i in doubtful
            if f"{MARK}{i}z" not in probe or (messages[i]["role"] != "assistant" and f"{MARK}{i}a" not in probe)
        ]

    def _calls_lost(self, messages: list[Message], text: str) -> bool:
        calls = [call for m in messages for call in m.get("tool_calls", []) if isinstance(call, dict)]
        return any(name not in text for name in _names(calls))


def _templates(config: Config, tokenizer: Any, key: str) -> tuple[dict[str, str], str]:
    """Templates by name, and the configured one, by name or as text; of a model folder those that transformers reads."""
    own = tokenizer.chat_template or _of_processor(config, key)
    named = dict(own) if isinstance(own, dict) else {"default": own} if own else {}
    wanted = config.model.chat_template or ""
    if isinstance(own, dict) and wanted in named:
        return named, named[wanted]
    if wanted and named and "{" not in wanted and "\n" not in wanted:
        guess = nearest(wanted, named)
        fix = f'model.chat_template = "{guess or next(iter(named))}"'
        expected = f"a Jinja template, or one of {', '.join(named)}"
        raise InputError("E403", "no such chat template", key, f'"{wanted}"', expected, fix)
    return named, wanted


def _of_processor(config: Config, key: str) -> Any:
    """The template of ``chat_template.json``, where models with a processor used to keep it; None without one."""
    file = Path(config.model.tokenizer or config.model.path) / "chat_template.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {one_line(error)} in {file}"
        raise InputError(
            "E403", "chat template failed", key, found, 'a table with "chat_template"', "repair it"
        ) from None


def _names(tools: list[dict[str, Any]]) -> list[str]:
    """Names of tools, or of called ones, in either usual form."""
    inner = (tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools)
    return [str(table["name"]) for table in inner if "name" in table]


def _shown(content: str, role: str, text: str) -> bool:
    if role == "assistant":
        content = content.rpartition("</think>")[2]
    return content.strip() in text or _squeezed(content) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())
