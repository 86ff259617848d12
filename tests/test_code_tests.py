"""Running a completion's program against tests: shares, forms of tests, and programs that try to cheat the judge."""

from __future__ import annotations

import json

import pytest

from rollout import code_tests, sandbox
from rollout.code_tests import passed_share, program_of
from rollout.reward_calls import CallFailed
from rollout.rewards import BUILTINS
from rollout.sandbox import Limits
from shared.errors import InputError

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox: {sandbox.sandbox_problem()}"),
]
TESTS = ["assert f(1) == 2", "assert f(2) == 3"]
RIGHT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return 0\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nno, better\n```python\nx = 2\n```", "x = 2\n"),
        ("```python3\nx = 1```", "x = 1"),
        ("```Python title='a'\nx = 1\n```", "x = 1\n"),
        ("```{.python}\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```bash\npip install x\n```\nThen\n```python\nx = 1\n```", "x = 1\n"),
        ("Use ```x``` so:\n```python\nx = 1\n```", "x = 1\n"),
        ("```text\nx = 1\n```", "```text\nx = 1\n```"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_fenced_block_or_the_whole_text(text, program):
    assert program_of(text) == program


@pytest.mark.parametrize(
    ("text", "tests", "share"),
    [
        (RIGHT, TESTS, 1),
        (f"Here it is:\n```python\n{RIGHT}```\nThat adds one.", TESTS, 1),
        (RIGHT, "\n\n".join(TESTS), 1),
        (RIGHT, json.dumps(TESTS), 1),
        ("def f(x):\n    return 2", TESTS, 0.5),
        ("def f(x):\n    return 1 / (x - 1)", ["assert f(2) == 1", "f(1)", "assert f(3) == 0.5"], 2 / 3),
        (WRONG, TESTS, 0),
        (RIGHT, ["y = f(1)", "assert y == 2"], 0.5),  # Each test stands alone.
        ("def f(", TESTS, 0),
        ("", TESTS, 0),
        ("raise ValueError", TESTS, 0),
    ],
)
def test_the_share_of_statements_that_pass(text, tests, share):
    assert passed_share(text, tests) == pytest.approx(share)


ADD = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    ("text", "tests", "share"),
    [
        (ADD, [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "5"}], 0.5),
        (ADD, {"inputs": ["1 2", "2 2"], "outputs": ["3", "4"]}, 1),
        (ADD, '[{"input": "1 2", "output": "3"}]', 1),
        ("import sys\nprint(sys.stdin.read().upper(), end='')", [{"input": "a\nb\n", "output": "A\nB"}], 1),
        ("if __name__ == '__main__':\n    print(1)", [{"input": "", "output": "1"}], 1),
        ("print(3)\nraise SystemExit(0)", [{"input": "", "output": "3"}], 1),
        ("print(3)\n1 / 0", [{"input": "", "output": "3"}], 0),
        (RIGHT + "print(f(int(input())))", [{"input": "1", "output": "2"}, "assert f(1) == 2"], 0.5),
    ],
)
def test_input_and_output(text, tests, share):
    assert passed_share(text, tests) == pytest.approx(share)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "import time; time.sleep(99)",
        "x = 'x' * (1 << 30)",
        "import os; os.kill(os.getpid(), 9)",
        "while True: print('x' * 99999)",
    ],
)
def test_a_program_that_hangs_crashes_or_bursts_is_0(program):
    assert passed_share(program, TESTS, Limits(1, 512), timeout_s=0.6) == 0


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x):\n    raise SystemExit(0)",
        "def f(x):\n    raise KeyboardInterrupt",
        "import os\ndef f(x):\n    os._exit(0)",
        "print('passed'); print('2 passed'); print({'extra': {'passed': [['', '']]}}); raise SystemExit(0)",
        f"import builtins\nbuiltins.print = lambda *a: None\nbuiltins.AssertionError = type('E', (), {{}})\n{WRONG}",
        f"import builtins\nbuiltins.Exception = SystemExit\nbuiltins.str = lambda *a: '1'\n{WRONG}",
        f"token = passed = True\nlog_extra = print\ncompletions = ['load']\n{WRONG}",
        f"import sys\nsys.modules['__main__'].token = 'x'\nsys.stdout = open('/dev/null', 'w')\n{WRONG}",
        "import sys; sys.stdout.close()\n" + WRONG,
        "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
        "import threading, os, time\nthreading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\ndef f(x):\n    time.sleep(1)",
    ],
)
def test_a_program_that_cheats_passes_nothing(program):
    assert passed_share(program, TESTS) == 0


@pytest.mark.parametrize(
    "cheat",
    [
        "import builtins\nbuiltins.exec = lambda *a: None",
        "import builtins\nreal = compile\nbuiltins.compile = lambda *a: real('1', 'x', 'exec')",
        "import sys\nfor name in list(sys.modules):\n    if name.startswith('rollout'): sys.modules[name].exec = lambda *a: None",
    ],
)
def test_replacing_what_runs_the_tests_passes_nothing(cheat):
    assert passed_share(f"{cheat}\n{WRONG}", TESTS) == 0


FORGE = """
import os
for fd in range(3, 250):
    try: os.write(fd, {0!r})
    except OSError: pass
"""


def frame(value) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(data).to_bytes(4, "big") + data


def test_a_forged_verdict_before_the_tests_passes_nothing():
    answer = {"values": [0.0], "extra": {"passed": [["1", "1"]]}, "metrics": {}}
    assert passed_share(FORGE.format(frame(answer) * 2), TESTS) == 0


@pytest.mark.parametrize(
    "forged",
    [
        frame(b"abc"),
        frame([]),
        frame(1),
        frame({}),
        frame({"extra": {"passed": []}}) * 2,
        frame({"failed": []}),
        frame({"failed": ["E308", "a", "b", "c", "d"]}),
        frame(b"[" * 100_000),
    ],
    ids=["text", "list", "number", "empty", "short", "no failure", "sandbox failure", "deep"],
)
def test_a_forged_answer_is_a_failing_program_and_not_a_failing_sandbox(forged):
    assert passed_share(FORGE.format(forged), TESTS) == 0


def test_an_endless_answer_is_not_kept():
    import resource

    flood = f"{FORGE.format(bytes([255] * 4))}\nwhile True:\n    for fd in range(3, 250):\n        try: os.write(fd, bytes(1 << 20))\n        except OSError: pass\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert passed_share(flood, TESTS, Limits(1, 512), timeout_s=0.6) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # Kilobytes.


def test_programs_do_not_see_each_other():
    assert passed_share("open('/tmp/left', 'w').write('x'); import builtins; builtins.left = 1", ["assert left"]) == 1
    assert passed_share("import os", ["assert not os.path.exists('/tmp/left')", "left"]) == 0.5


def test_a_sandbox_that_fails_raises_and_is_no_0(monkeypatch):
    def broken(*_, **__):
        raise InputError(
            "E301", "reward import failed", "code_tests", "no user namespaces", "a child", "see its output"
        )

    monkeypatch.setattr(code_tests, "Child", broken)
    with pytest.raises(InputError, match="no user namespaces"):
        passed_share(RIGHT, TESTS)

    class Refuses:
        def __init__(self, *_, **__): ...
        def kill(self): ...
        def call(self, *_):
            raise CallFailed("E308", "no sandbox", "x", "y", "z")

    monkeypatch.setattr(code_tests, "Child", Refuses)
    with pytest.raises(CallFailed):
        passed_share(RIGHT, TESTS)


def test_the_reward_reads_its_column_and_conversations():
    completions = [RIGHT, [{"role": "assistant", "content": f"```python\n{RIGHT}```"}], WRONG]
    tests = [TESTS, ["assert f(1) == 2", "assert f(1) == 3"], TESTS]
    assert BUILTINS["code_tests"](completions, tests=tests, prompts=[]) == [1, 0.5, 0]
    assert BUILTINS["code_tests"]([RIGHT], column="asserts", asserts=[TESTS]) == [1]
