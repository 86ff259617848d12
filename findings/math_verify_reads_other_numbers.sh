#!/usr/bin/env bash
# math-verify 0.9.0 reads common ways to write a number as another number, without an error.
#
# Thousands groups with a thin space, a number with its base, scientific notation and a repeating decimal parse to values
# that are not meant: a grader that compares them pays wrong answers and refuses right ones.
# Seen with math-verify 0.9.0 and its antlr4-13-2 extra on Python 3.11 (2026-11-28): the output below is what it printed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check 'math-verify[antlr4-13-2]==0.9.0'
"$place/venv/bin/python" - <<'PYTHON' | tee "$place/said"
from math_verify import parse, verify

for text in (r"$1\,000$", r"$12\,345$", "$52_8$", "$1e-7$", r"$0.\overline{3}$"):
    print(text, "->", parse(text)[0])
print("1\\,000 equals 0:", verify(parse(r"$1\,000$"), parse("$0$")))
print("1\\,000 equals 1000:", verify(parse(r"$1\,000$"), parse("$1000$")))
print("52 in base 8 equals 52:", verify(parse("$52_8$"), parse("$52$")))
PYTHON
cat > "$place/expected" <<'TEXT'
$1\,000$ -> 1*0
$12\,345$ -> 357
$52_8$ -> 52
$1e-7$ -> -7 + 1*E
$0.\overline{3}$ -> 0
1\,000 equals 0: True
1\,000 equals 1000: False
52 in base 8 equals 52: True
TEXT
diff "$place/expected" "$place/said"
