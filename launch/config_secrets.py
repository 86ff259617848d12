"""Is there a secret in the configuration? The run folder, the report and the sinks repeat all of it.

Preflight calls ``check_secrets``. A secret is known by its value in the environment, by the name it stands under, by its own
form, or as a part of an address. The way for secrets is the name of an environment variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from shared.config import Config
from shared.errors import InputError, raise_all

VARIABLES = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
"""Words in the name of an environment variable that holds a secret."""
LEAST_LENGTH = 8
"""Shorter values of such variables are flags and names, not secrets."""
NAMES = re.compile(
    r"(?:api|access|private|secret|signing|account|auth|refresh|hf|hub|bearer|session)(?:key|token)s?$"
    r"|secrets?$|passwords?$|passwd$|passphrase$|credentials?$|authorization$|bearer$|cookie$"
)
"""Ends of names, without what parts their words, whose values are secrets whatever they look like."""
LIKELY_NAMES = re.compile(r"(?:token|key|auth|pwd)s?$")
"""Ends of names whose values are secrets if they look random: ``stop_token`` and ``answer_key`` are names of ordinary things."""
QUERY_NAMES = re.compile(r"(?:token|key|auth|pwd|sig|signature)$")
"""Further ends of names of parameters in an address."""
RANDOM = re.compile(r"(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])[\w\-+/=.]{20,}|(?=.*[0-9])[0-9a-f-]{32,}")
FORMS = {
    r"sk-(?=[\w-]*\d)[\w-]{20,}": "sk-…",
    r"[rs]k_(?:live|test)_\w{16,}": "sk_live_…",
    r"hf_[A-Za-z0-9]{30,}": "hf_…",
    r"gh[opsur]_[A-Za-z0-9]{30,}": "ghp_…",
    r"github_pat_\w{22,}": "github_pat_…",
    r"glpat-[\w-]{20,}": "glpat-…",
    r"xox[abeoprs]-[\w-]{10,}": "xoxb-…",
    r"A[KS]IA[A-Z0-9]{16}(?![A-Z0-9])": "AKIA…",
    r"AIza[\w-]{35}": "AIza…",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.": "eyJ….eyJ…",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----": "BEGIN PRIVATE KEY",
    r"(?:Bearer|Basic) +[\w\-+/=.]{8,}": "Bearer …",
}
"""Forms of the keys of well-known services -> how a message names them."""


def check_secrets(config: Config, origin: str) -> None:
    """Raises ``InputErrors`` E704 if the configuration holds something that is a secret by the look of it."""
    variables = {
        value: name
        for name, value in os.environ.items()
        if VARIABLES & set(name.upper().split("_")) and len(value) >= LEAST_LENGTH and not value.startswith("/")
    }
    problems = []
    for key, text in _texts(config.model_dump(), ""):
        if found := _found(key, text, variables):
            fix = 'name an environment variable instead, as in args = { token_env = "NAME" }'
            problems.append(InputError("E704", "secret in the config", f"{origin}:{key}", found, "no secret", fix))
    raise_all(problems)


def _found(key: str, text: str, variables: dict[str, str]) -> str:
    """What makes ``text`` a secret, without repeating it; empty if nothing does."""
    for value, name in variables.items():
        if value in text:
            return f"the value of {name}"
    for form, shown in FORMS.items():
        if re.search(rf"(?<![A-Za-z0-9]){form}", text):
            return f"a key of the form {shown}"
    if "://" in text and (found := _in_address(text)):
        return found
    name = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2]
    end = _joined(name)
    ordinary = key.startswith("data.") or not text  # Names of columns, and texts for templates.
    if not ordinary and (NAMES.search(end) or (LIKELY_NAMES.search(end) and RANDOM.fullmatch(text))):
        return f"a value under the name {name}"
    return ""


def _in_address(text: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError:
        return ""
    if parts.password:
        return "a password"
    for name, value in parse_qsl(parts.query):
        if value and (NAMES.search(_joined(name)) or QUERY_NAMES.search(_joined(name))):
            return f"the parameter {name}"
    return ""


def _joined(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string in ``value``, free tables included, with the setting that holds it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{i}]")
