r"""Rewrite answers in plain ASCII, and find the box in them.

Signs, digits, spaces and fractions of other alphabets and of LaTeX become the plain ones: a minus is a hyphen,
``1{,}000`` is ``1000``, ``\frac{3}{4}`` is ``3/4``. Every function takes time linear in the length of the text. Needs the
standard library only.
"""

from __future__ import annotations

import re
import unicodedata

MOST_DIGITS = 400
"""Digits of a number beyond which nothing is computed."""

_SIGNS = dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d\u2796\u02d7", "-")
_MARKS = {
    **{"\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2236": ":"},
    **{"\u2019": "'", "\u02bc": "'", "\u066b": ".", "\u066c": ",", "\u066a": "%", "\ufe6a": "%", "\uff65": "*"},
    **{"\u221a": "\\sqrt ", "\u03c0": "\\pi ", "\u00b1": "\\pm ", "\u2213": "\\pm ", "\u2260": "\\neq "},
    **{"\u2103": "\u00b0", "\u2032": "'", "\uff0c": ", "},
}
_SUPER = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-", strict=True)
)
_SUB = dict(zip("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPER)}]+")
_LOWERED = re.compile(f"[{''.join(_SUB)}]+")
_WIDE_COMMA = re.compile("(?<=[0-9\uff10-\uff19])\uff0c(?=[0-9\uff10-\uff19]{3}(?![0-9\uff10-\uff19]))")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e\u2189])")
_SPACED_MINUS = re.compile("(\\S{0,40})(\\s{0,3})[\u2212\uff0d\ufe63\u2796]\\s{1,3}(?=[\\d.$\u20ac\u00a3])")
_OTHER = re.compile(r"[^\x00-\x7f]")


def _ascii(match: re.Match[str]) -> str:
    char = match[0]
    if char in _SIGNS:
        return "-"
    if char in _MARKS:
        return _MARKS[char]
    if "\uff01" <= char <= "\uff5e":
        return chr(ord(char) - 0xFEE0)
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "Zs":
        return " "
    if kind == "Cf":  # Zero width, or a direction of writing.
        return ""
    return char


def _vulgar(match: re.Match[str]) -> str:
    before, char = match[1], match[2]
    fraction = unicodedata.normalize("NFKC", char).replace("\u2044", "/")
    return f"{before} {fraction}" if before else fraction


def _attached(match: re.Match[str]) -> str:
    """A true minus, no dash, with a space after it: a sign, but after a number, a bracket or a variable."""
    before = match[1]
    operand = len(before) == 1 or before[-1:].isdigit() or before[-1:] in (")", "]", "}", "%")
    return match[0] if before and operand else f"{match[1]}{match[2]}-"


def in_ascii(text: str) -> str:
    """``text`` with signs, digits, spaces and fractions of other alphabets as the plain ones; the rest is unchanged."""
    if text.isascii():
        return text
    text = _WIDE_COMMA.sub(",", text)
    text = _SPACED_MINUS.sub(_attached, _VULGAR.sub(_vulgar, text))
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPER[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_SUB[c] for c in m[0]) + "}", text)
    return _OTHER.sub(_ascii, text)


_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:thin|med|thick|en)space(?![a-zA-Z])|\\q?quad(?![a-zA-Z])|\\[hm]space\s?\{[^{}]*\}|\{ \}|~"
)
_NOTHING = re.compile(
    r"(?<!\\)\\!\s?|\\(?:left|right|displaystyle|phantom|limits|bf|rm|it|[Bb]igg?[lr]?)(?![a-zA-Z])|\\negthinspace(?![a-zA-Z])"
)
_GROUP = re.compile(
    r"(?<![\d.,])([1-9]\d{0,2})(?:((?:,\d{2,3})*,\d{3})|((?: \d{3})+)|((?:'\d{3})+)|((?:_\d{3})+)|((?:\.\d{3}){2,})|((?:\.\d{3})+(?=,\d)))(?!\d)"
)


def _ungrouped(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"\D", "", match[0][len(match[1]) :])


def without_groups(text: str) -> str:
    r"""``text`` (ASCII) without what stands between groups of digits: ``1,000``, ``1 000``, ``1{,}000``, ``1\,000``."""
    text = text.replace("{,}", ",").replace("{\\,}", " ").replace("{'}", "'")
    if "\\" in text or "~" in text or "{ }" in text:
        text = _SPACES.sub(" ", _NOTHING.sub("", text))
    return _GROUP.sub(_ungrouped, text)


_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol|bm|fbox|boxed|operatorname)\s?"
    r"\{([^{}]*)\}"
)
_FRACTION = re.compile(r"(?:(\d)\s?)?\\(?:[dtc]|nice|s)?frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s?\\(?:overline|bar|dot)\s?(?:\{\s?(\d+)\s?\}|(\d))")
_BRACED = re.compile(r"(?<![\^_a-zA-Z\]}])\{\s?(-?[\d.]*)\s?\}")
_WORDS = {"\\times": "*", "\\cdot": "*", "\\ast": "*", "\\div": "/", "\\%": "%", "\\$": "$", "\\#": "#", "\\&": "&"}
_WORD = re.compile(r"\\(?:times|cdot|ast|div)(?![a-zA-Z])|\\[%$#&]")
_DEGREES = re.compile(r"\^\s?\{?\s?\\circ(?![a-zA-Z])\s?\}?|\\degrees?(?![a-zA-Z])")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,(\[])(\d+),(\d{1,2}|(?<=\b0,)\d+)(?![\d,])")
_PLAIN = re.compile(r"\s?-?[\d.]+\s?")


def _repeated(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + fixed + period) > MOST_DIGITS:
        return match[0]
    bottom = (10 ** len(period) - 1) * 10 ** len(fixed)
    return f"\\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{bottom}}}"


def without_repeating(text: str) -> str:
    r"""``text`` with repeating decimals as fractions: ``0.\overline{3}`` is ``\frac{3}{9}``."""
    return _REPEATING.sub(_repeated, text) if "\\" in text else text


def _slashed(match: re.Match[str]) -> str:
    whole, top, bottom = match[1], match[2] or match[3] or "", match[4] or match[5] or ""
    parts = [part.strip() if _PLAIN.fullmatch(part) else f"({part})" for part in (top, bottom)]
    return f"{whole} {parts[0]}/{parts[1]}" if whole else f"{parts[0]}/{parts[1]}"


def plain(text: str, decimal_comma: bool = True) -> str:
    r"""``text`` as plain characters: ``\frac{3}{4}`` is ``3/4``, ``1{,}000`` is ``1000``, a minus is a hyphen.

    With ``decimal_comma``, ``3,5`` is 3.5 and no list.
    """
    text = without_groups(in_ascii(text))
    if "\\" in text:
        text = without_repeating(text)
        text = _DEGREES.sub("\u00b0", _WORD.sub(lambda m: _WORDS[m[0]], text))
        for _ in range(3):  # As deep as wrappers are nested in real answers.
            text = _WRAPPED.sub(r"\1", text)
        text = _DELIMITERS.sub(" ", _FRACTION.sub(_slashed, text))
        text = without_groups(text)
    if "{" in text:
        text = _BRACED.sub(r"\1", text)
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if decimal_comma else text


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_box(text: str) -> tuple[str | None, int]:
    r"""The content of the last ``\boxed{...}`` with balanced braces, or None; and where it begins, or -1.

    Braces that are written (``\{``) need no partner.
    """
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"), text.rfind("\\boxed {"))
    if start < 0:
        return None, -1
    begin = text.index("{", start)
    depth = 0
    for brace in _BRACE.finditer(text, begin):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[begin + 1 : brace.start()], start
    return None, -1


def declared_answer(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}`` or ``<answer>...</answer>``, whichever comes later; None if there is neither."""
    box, start = last_box(text)
    end = text.rfind("</answer>")
    opened = text.rfind("<answer>", 0, max(end, 0))
    if opened > start:
        inside = text[opened + len("<answer>") : end]
        return last_box(inside)[0] or inside
    return box
