#!/usr/bin/env bash
# reasoning-gym 0.1.25: scorers of several tasks pay full credit for answers that are wrong.
#
# coin_flip pays "0" in full, gsm_symbolic ignores the sign, and game_of_life_halting pays any text that is not empty: a
# policy learns the loophole.
# Seen on Python 3.11 (2026-11-28).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
"$place/venv/bin/python" - <<'PYTHON' | tee "$place/said"
import reasoning_gym


def paid(task, answer, size=20):
    """Rows of ``task`` in which ``answer(row)`` has full credit although it differs from the row's own answer."""
    data = reasoning_gym.create_dataset(task, size=size, seed=1)
    rows = [data[i] for i in range(size)]
    wrong = [row for row in rows if answer(row) != row["answer"]]
    return f"{sum(data.score_answer(answer(row), row) == 1.0 for row in wrong)} of {len(wrong)}"


print("coin_flip, 0:", paid("coin_flip", lambda row: "0"))
print("gsm_symbolic, the answer negated:", paid("gsm_symbolic", lambda row: f"-{row['answer']}"))
print("game_of_life_halting, zzz:", paid("game_of_life_halting", lambda row: "zzz"))
PYTHON
cat > "$place/expected" <<'TEXT'
coin_flip, 0: 19 of 20
gsm_symbolic, the answer negated: 20 of 20
game_of_life_halting, zzz: 20 of 20
TEXT
diff "$place/expected" "$place/said"
