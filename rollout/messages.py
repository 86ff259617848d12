"""What a row gives a chat template: messages with text as content, tool descriptions, further variables.

Templates test whether a key is there, and join contents as text. So keys without a value are left out, as parquet fills
them in, and parts of a content are joined. What is no text is refused with its row.
"""

from __future__ import annotations

import json
from typing import Any

from shared.errors import InputError

Message = dict[str, Any]
TEXT_PARTS = {"text", "input_text", "output_text"}
"""Values of ``type`` of the parts that are text, in the forms that services and exporters write."""
TOOLS, OPTIONS = "tools", "chat_template_kwargs"
"""Columns that go to the chat template, as well as to the reward functions."""
SET_HERE = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "strftime_now"),
}
"""Variables of a template, and arguments of what renders it, that a row must not set."""


def messages_of(value: list[Any], place: str) -> list[Message]:
    """The messages of a row with text as content. Raises ``InputError`` E206 for what is no message of text."""
    return [_message(message, f"message {number}", place) for number, message in enumerate(value, 1)]


def tools_of(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The row's descriptions of tools, from its column ``tools``: a list of tables, or that as JSON; None without any.

    Raises ``InputError`` E206.
    """
    value = _parsed(row.get(TOOLS))
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        expected, fix = "a list of tables, each describing a tool", "rename the column if it is meant for rewards only"
        raise InputError("E206", "tools are no tools", f"{place}:{TOOLS}", _kind(value), expected, fix)
    return [without_none(tool) for tool in value]


def options_of(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Variables for the chat template, from the row's column ``chat_template_kwargs``. Raises ``InputError`` E206."""
    value = _parsed(row.get(OPTIONS))
    if not value:
        return {}
    if not isinstance(value, dict):
        found, fix = _kind(value), "write it as a table"
        raise InputError("E206", "template variables are no table", f"{place}:{OPTIONS}", found, "a table", fix)
    taken = sorted(SET_HERE & set(value))
    if taken:
        found, expected, fix = ", ".join(taken), "variables of the template", "leave them out"
        raise InputError("E206", "template variable is taken", f"{place}:{OPTIONS}", found, expected, fix)
    variables: dict[str, Any] = without_none(value)
    return variables


def without_none(value: Any) -> Any:
    """``value`` without the keys, at any depth, that have no value."""
    if isinstance(value, dict):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def _message(message: Any, which: str, place: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        found = f"{which} with {', '.join(message) or 'nothing'}" if isinstance(message, dict) else _kind(message)
        fix = "write each message as role and content"
        raise InputError("E206", "no message", place, found, "tables with role and content", fix)
    clean: Message = without_none(message)
    if not clean.get("tool_calls"):
        clean.pop("tool_calls", None)
    content = clean.get("content")
    if content is None:
        content = ""
    elif isinstance(content, list) and (role != "tool" or all(_is_part(part) for part in content)):
        content = "\n".join(_part_text(part, which, place) for part in content)
    elif not isinstance(content, str) and role != "tool":
        found, fix = f"{_kind(content)} in {which}", "write the content as text"
        raise InputError("E206", "content is no text", place, found, "text, or a list of text parts", fix)
    return clean | {"content": content}


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and ("type" in part or set(part) == {"text"}))


def _part_text(part: Any, which: str, place: str) -> str:
    """The text of a part of a content. Raises ``InputError`` E206 for an image, a sound, or whatever else it is."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS:
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    named = isinstance(kind, str) and kind not in TEXT_PARTS
    found = f"{kind if named else 'a part without text'} in {which}"
    fix = "leave out the row, or the part; models are trained on text only"
    raise InputError("E206", "content is no text", place, found, "parts of type text", fix)


def _parsed(value: Any) -> Any:
    """``value``, read where it is JSON: some writers store nested values as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _kind(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__
