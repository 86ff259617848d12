#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0: the marker xdist_group has no effect, and nothing says so.
#
# xdist appends the group to `item._nodeid`; since pytest 9.2 `nodeid` is read from another attribute. With
# `--dist loadgroup` two tests of one group run in two processes, and fixtures that the group should share are made twice.
# Seen on Python 3.11 (2026-11-28).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0
cat > "$place/test_group.py" <<'PYTHON'
import time

import pytest

pytestmark = pytest.mark.xdist_group("one")


@pytest.mark.parametrize("number", range(4))
def test_member(number):
    time.sleep(0.5)
PYTHON
cd "$place"
"$place/venv/bin/python" -m pytest -v -p no:cacheprovider -n 2 --dist loadgroup test_group.py | tee "$place/said"
processes=$(grep -o '^\[gw[0-9]\]' "$place/said" | sort -u | wc -l)
echo "processes that ran tests of the one group: $processes (1 would be right)"
test "$processes" = 2
