"""Programs in the sandbox of ``code_tests``: every form of tests, every way to read and write, and one test and the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout import code_tests, sandbox
from rollout.code_tests import PARALLEL, CodeTests, count_tests, limits_of_test, longest_s, passed_share
from rollout.reward_calls import CallFailed
from rollout.rewards import BUILTINS
from rollout.sandbox import ROOT, Limits
from shared.config_reward import RewardFunction

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox: {sandbox.sandbox_problem()}"),
]
RIGHT = "def f(x):\n    return x + 1\n"
TESTS = ["assert f(1) == 2", "assert f(2) == 3"]

# --- forms ---

ADD = "a, b = map(int, input().split())\nprint(a + b)"
ADD_FUNCTION = "def add(a, b):\n    return a + b\n"
HUMANEVAL = (
    "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 5) == 5\n"
)
HELPED = f"def helper(x):\n    return -x\n\n{ADD_FUNCTION}\ndef main():\n    print(add(1, 2))\n\nif __name__ == '__main__':\n    main()\n"
SOLUTION = """class Solution:
    def helper(self, x: int) -> int:
        return x

    def add(self, a: int, b: Optional[int] = None) -> int:
        return self.helper(sum([a, b], start=0)) + len(deque())
"""
UNITTEST = """import unittest

class TestAdd(unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(1, 2), 3)

if __name__ == "__main__":
    unittest.main()
"""
LINKED = """class Solution:
    def last(self, head: Optional[ListNode]) -> int:
        return self.last(head.next) if head.next else head.val
"""
CHAIN = "def check(candidate):\n    head = ListNode(7)\n    for i in range(3000):\n        head = ListNode(i, head)\n    assert candidate(head) == 7"
MBPP = ["assert area(1) == math.pi", "assert side(Square(2)) == 2"]
SQUARE = "class Square:\n    def __init__(self, s):\n        self.s = s\n\ndef side(q):\n    return q.s\n\ndef area(r):\n    import math\n    return math.pi * r * r\n"
BODY = {"entry_point": "add", "prompts": 'def add(a, b):\n    """Add."""\n'}
FORMS = {
    "humaneval": (ADD_FUNCTION, HUMANEVAL, {"entry_point": "add"}),
    "humaneval without entry point": (HELPED, HUMANEVAL, {}),
    "humaneval, check appended": (HELPED, f"{HUMANEVAL}\ncheck(add)\n", {"entry_point": "add"}),
    "humaneval, body alone": ("    return a + b\n", HUMANEVAL, BODY),
    "humaneval, a class": (SOLUTION, HUMANEVAL, {}),
    "humaneval in a list": (ADD_FUNCTION, [HUMANEVAL], {"entry_point": "add"}),
    "leetcode, expression": (SOLUTION, HUMANEVAL, {"entry_point": "Solution().add"}),
    "leetcode, functional": (SOLUTION, json.dumps({"functional": f"{HUMANEVAL}\ncheck(Solution().add)"}), {}),
    "leetcode, linked list": (LINKED, CHAIN, {"entry_point": "Solution().last"}),
    "mbpp": (SQUARE, MBPP, {"test_imports": ["import math"], "test_setup_code": "root = Square(3)"}),
    "pytest": (ADD_FUNCTION, "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n", {}),
    "unittest": (ADD_FUNCTION, UNITTEST, {}),
    "bare comparison": (ADD_FUNCTION, ["add(1, 2) == 3"], {}),
    "types that are not imported": ("def add(a: List[int], b) -> Optional[int]:\n    return a + b\n", HUMANEVAL, {}),
    "imports in the list": (ADD_FUNCTION, ["import math", "assert add(1, 2) == math.floor(3.5)"], {}),
    "apps, function": (ADD_FUNCTION, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]}, {}),
    "apps, method": (SOLUTION, json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}), {}),
    "call with names": (ADD_FUNCTION, {"fn_name": "add", "inputs": [{"a": 1, "b": 2}], "outputs": [3]}, {}),
    "call, tuples and sets": (
        "def f(x):\n    return (x, {3, 1, 2}, {x: 0.1 + 0.2}, range(2))",
        {"fn_name": "f", "inputs": [[1]], "outputs": [[1, [1, 2, 3], {"1": 0.3}, [0, 1]]]},
        {},
    ),
    "livecodebench, function": (
        SOLUTION,
        [{"input": "1\n2", "output": "3", "testtype": "functional"}],
        {"metadata": '{"func_name": "add"}'},
    ),
    "livecodebench, stdin": (ADD, [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}], {}),
    "taco, lines": (ADD, {"inputs": [["1 2"], ["3 4"]], "outputs": [["3"], ["7"]]}, {}),
    "floats": ("print(1 / 2, 1 / 3)", [{"input": "", "output": "0.50000 0.333333"}], {}),
}
WRONG = {
    "a + b": "a - b",
    "sum([a, b], start=0)": "a",
    "head.val": "0",
    "q.s": "-1",
    "r * r": "r + r",
    "0.1 + 0.2": "0.4",
    "1 / 2": "1",
}
"""What makes the right programs wrong."""


@pytest.mark.parametrize(("program", "tests", "row"), FORMS.values(), ids=FORMS)
def test_a_right_program_passes_and_a_wrong_one_fails_whatever_the_form(program, tests, row):
    wrong = program
    for right, error in WRONG.items():
        wrong = wrong.replace(right, error)
    assert wrong != program
    assert passed_share(program if row is BODY else f"```python\n{program}```", tests, row=row) == 1
    assert passed_share(wrong, tests, row=row) == 0


@pytest.mark.parametrize("tests", [None, [], "", "def (:", ["def (:", TESTS[0]], {"code": "assert f(1) == 2"}, [1]])
def test_tests_that_are_not_understood_give_no_reward(tests):
    assert passed_share(RIGHT, tests) is None
    assert BUILTINS["code_tests"]([RIGHT, RIGHT], tests=[tests, TESTS]) == [None, 1]


def test_the_reward_takes_what_belongs_to_the_tests_from_the_other_columns():
    rows = {"entry_point": ["add", "sub"], "prompts": [BODY["prompts"], "Subtract."]}
    programs = ["    return a + b", "def sub(a, b):\n    return a + b\n\ndef other(a, b):\n    return 0"]
    assert BUILTINS["code_tests"](programs, column="test", test=[HUMANEVAL] * 2, **rows) == [1, 1]


# --- input and output ---

WAYS = [
    "print(sum(map(int, sys.stdin.read().split())))",
    "print(sum(map(int, sys.stdin.buffer.read().split())))",
    "input = sys.stdin.buffer.readline\nprint(sum(map(int, input().split())) + int(input()))",
    "input = sys.stdin.readline\nprint(sum(map(int, input().split())) + int(input()))",
    "print(sum(map(int, input().split())) + int(input()))",
    "print(sum(map(int, open(0).read().split())))",
    "print(sum(map(int, open('/dev/stdin').read().split())))",
    "print(sum(map(int, os.read(0, 1000).split())))",
    "print(sum(map(int, b''.join(iter(lambda: os.read(0, 1), b'')).split())))",
    "print(sum(int(x) for line in fileinput.input() for x in line.split()))",
    "print(sum(int(x) for line in sys.stdin for x in line.split()))",
    "import io\ndata = io.BytesIO(os.read(0, os.fstat(0).st_size))\nprint(sum(map(int, data.read().split())))",
    "sys.stdout.buffer.write(b'6\\n')",
    "os.write(1, b'6\\n')",
    "print(6, file=sys.__stdout__)",
    "print(6, flush=True)\nos._exit(0)",
    "sys.stdout.write('6')\nsys.exit()",
    "print(6)\nexit()",
    "print(6)\nsys.exit('done')",
    "out = os.fdopen(1, 'w')\nout.write('6')\nout.close()",
    "import io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii')\nprint(6)",
    "import io\nlater = io.StringIO()\nsys.stdout = later\nprint(6)\nsys.__stdout__.write(later.getvalue())",
    "print(6)\nsys.stdout.close()",
    "import atexit\natexit.register(print, 6)",
    "import threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\nt = threading.Thread(target=print, args=(6,))\nt.start()",
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print(6))).start()",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(3) as pool:\n    print(sum(pool.map(int, sys.stdin.read().split())))",
    "if __name__ == '__main__':\n    print(6)",
    "import __main__\nx = 6\nprint(__main__.x)",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 6\nprint(A().x)",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nprint(6 if dataclasses.fields(A)[0].type is int else 0)",
    "import pickle\nclass A:\n    x = 6\nprint(pickle.loads(pickle.dumps(A())).x)",
    "import asyncio\nasync def go():\n    print(6)\nasyncio.run(go())",
    "import numpy\nprint(numpy.loadtxt(sys.stdin.read().split(), dtype=int).sum())",
    "print(len(sys.argv) + 5)",
    "print(5, file=sys.stderr)\nprint(6)",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_program_has_the_descriptors_of_a_process(way):
    assert (
        passed_share(f"import fileinput, os, sys\n{way}", [{"input": "1 2\n3\n", "output": "6"}], Limits(2, 1024)) == 1
    )


def test_text_goes_through_as_it_is():
    strange = "naïve 四十二 😀\t\u2028x\n"
    for echo in ("import sys\nprint(sys.stdin.read())", "import os\nos.write(1, os.read(0, 1000))"):
        assert passed_share(echo, [{"input": strange, "output": strange}]) == 1
    long = "word " * 200_000
    assert passed_share("import sys\nsys.stdout.write(sys.stdin.read())", [{"input": long, "output": long}]) == 1


def test_what_a_program_prints_without_end_is_not_kept():
    for printing in ("while True: print('x' * 99999)", "import os\nwhile True: os.write(1, bytes(99999))"):
        assert passed_share(printing, [{"input": "", "output": "x"}] * 2) == 0


# --- one test and the next ---

COUNT = "import os, sys, builtins\n"
LEAVES = {
    "a global": "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)",
    "a module": COUNT + "def f(x):\n    sys.seen = getattr(sys, 'seen', 0) + 1\n    return sys.seen",
    "a built-in name": COUNT
    + "def f(x):\n    builtins.seen = getattr(builtins, 'seen', 0) + 1\n    return builtins.seen",
    "a file": COUNT
    + "def f(x):\n    there = os.path.exists('/tmp/left')\n    open('/tmp/left', 'w').close()\n    return 1 + there",
    "an empty folder in a folder": COUNT
    + "def f(x):\n    there = os.path.exists('/tmp/a/b')\n    os.makedirs('/tmp/a/b', exist_ok=True)\n    return 1 + there",
    "rights of the folder": COUNT
    + "def f(x):\n    there = os.stat('/tmp').st_mode & 0o777 == 0o700\n    os.chmod('/tmp', 0o700)\n    return 1 + there",
    "no rights of the folder": COUNT + "def f(x):\n    os.chmod('/tmp', 0)\n    return 1",
    "what loading left": "import os\nif os.path.exists('/tmp/x'):\n    raise ValueError\nopen('/tmp/x', 'w')\ndef f(x):\n    return 1",
    "the working folder": COUNT
    + "def f(x):\n    there = os.getcwd()\n    os.chdir('/')\n    return 1 + (there == '/')",
    "environment": COUNT
    + "def f(x):\n    os.environ['N'] = str(int(os.environ.get('N', 0)) + 1)\n    return int(os.environ['N'])",
    "a thread": COUNT
    + "import threading, time\ndef f(x):\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n    return threading.active_count() - 1",
    "shared memory": COUNT
    + "import ctypes\ndef f(x):\n    libc = ctypes.CDLL(None)\n    there = libc.shmget(7, 4096, 0o600) >= 0\n    libc.shmget(7, 4096, 0o1600)\n    return 1 + there",
    "a message queue": COUNT
    + "import ctypes\ndef f(x):\n    libc = ctypes.CDLL(None)\n    there = libc.msgget(7, 0o600) >= 0\n    libc.msgget(7, 0o1600)\n    return 1 + there",
    "limits of the harness": COUNT
    + "import resource\ndef f(x):\n    try: resource.prlimit(1, resource.RLIMIT_NOFILE, (9, 9))\n    except OSError: return 1\n    return 2",
    "the harness's memory": COUNT
    + "def f(x):\n    try: open('/proc/1/mem', 'r+b')\n    except OSError: return 1\n    return 2",
    "the harness's descriptors": COUNT
    + "def f(x):\n    for fd in os.listdir('/proc/1/fd'):\n        try: return 2 + os.open(f'/proc/1/fd/{fd}', os.O_WRONLY)\n        except OSError: pass\n    return 1",
}


@pytest.mark.parametrize("program", LEAVES.values(), ids=LEAVES)
def test_nothing_of_a_test_reaches_the_next(program):
    assert passed_share(program, {"fn_name": "f", "inputs": [[1]] * 3, "outputs": [1] * 3}) == 1
    assert passed_share(program, ["assert f(1) == 1"] * 3) == 1


@pytest.mark.parametrize(
    "crash",
    [
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import ctypes; ctypes.string_at(0)",
        "while True: pass",
        "import time; time.sleep(99)",
        "x = 'x' * (1 << 30)",
        "raise SystemExit",
        "import os; os.kill(1, 9); os.kill(1, 15); os.kill(1, 19); os.kill(-1, 9)",
        "import os; os.killpg(0, 9)",
        "import os\nfor fd in range(3, 250):\n    try: os.close(fd)\n    except OSError: pass\nraise ValueError",
    ],
)
def test_a_test_that_hangs_or_crashes_fails_alone(crash):
    body = "\n".join(f"        {line}" for line in crash.split("\n"))
    program = f"def f(x):\n    if x == 1:\n{body}\n    return x + 1"
    tests = ["assert f(0) == 1", "assert f(1) == 2", "assert f(2) == 3"]
    assert passed_share(program, tests, Limits(1, 512), 2.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("program", "wall_s", "share"),
    [
        ("import time\ndef f(n):\n    time.sleep(9 if n < 3 else 0)\n    return n", 0.5, 0),
        ("import time\ndef f(n):\n    time.sleep(9 if n < 2 else 0)\n    return n", 2.0, 38 / 40),
        ("import time\ntime.sleep(9)\ndef f(n):\n    return n", 0.5, 0),
        ("def f(n):\n    while n < 3: pass\n    return n", 9.0, 0),
    ],
)
def test_after_three_tests_over_a_limit_of_time_the_others_fail_and_are_not_run(monkeypatch, program, wall_s, share):
    real, loaded = code_tests.Child.call, []

    def call(child, payload, timeout_s):
        loaded.extend([1] if payload["step"] == "load" else [])
        return real(child, payload, timeout_s)

    monkeypatch.setattr(code_tests.Child, "call", call)
    tests = {"fn_name": "f", "inputs": list(range(40)), "outputs": list(range(40))}
    assert passed_share(program, tests, Limits(1, 512), wall_s) == share
    assert len(loaded) == (40 if share else 3)


@pytest.mark.parametrize("tests", [["f(1)"] * 9, {"inputs": ["1"] * 9, "outputs": ["1"] * 9}])
def test_a_text_that_is_no_program_is_tried_once(monkeypatch, tests):
    real, calls = code_tests.Child.call, []
    monkeypatch.setattr(code_tests.Child, "call", lambda *arguments: calls.append(1) or real(*arguments))
    assert passed_share("I do not know.", tests, row={"prompts": "What is 1?"}) == 0
    assert len(calls) == 1


def test_time_grows_with_the_number_of_tests():
    def spent(count):
        return longest_s([count] * PARALLEL) - longest_s([0] * PARALLEL)

    assert spent(200) == pytest.approx(2 * 200 * 2)  # The CPU limit of each, in every lane and once more.
    assert longest_s([]) == 0
    assert count_tests(TESTS, {}) == 2
    assert count_tests([1], {}) == 0


def test_the_limits_of_a_configured_reward_are_those_of_one_test():
    def share(**fields):
        return CodeTests.configured(RewardFunction(function="code_tests", **fields))([program], tests=[TESTS])[0]

    program = f"import time\nx = bytearray(700 << 20)\ntime.sleep(0.3)\n{RIGHT}"
    assert share() == 0
    assert share(memory_mb=2048) == 1
    assert share(memory_mb=2048, timeout_s=0.2) == 0
    limits, timeout_s = limits_of_test(RewardFunction(function="code_tests", cpu_s=9))
    assert (limits.cpu_s, limits.memory_mb, timeout_s) == (9, 512, 12)


def test_a_program_has_one_sandbox_for_its_tests_unless_one_leaves_something_behind(monkeypatch):
    started = []

    class Counted(code_tests.Child):
        def __init__(self, *arguments, **options):
            started.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(code_tests, "Child", Counted)
    assert passed_share(ADD, {"inputs": ["1 2"] * 30, "outputs": ["3"] * 30}) == 1
    assert len(started) == 1
    writes = "open('/tmp/left', 'x')\nprint(3)"
    assert passed_share(writes, {"inputs": ["1 2"] * 3, "outputs": ["3"] * 3}) == 1
    assert len(started) == 4


def test_what_a_program_leaves_when_it_fails_to_load_does_not_reach_the_next_test():
    program = "import os\nos.mkdir('/tmp/x')\nraise ValueError"
    seen = "import os\ndef f(x):\n    return 2\nif not os.path.exists('/tmp/x'):\n    os.mkdir('/tmp/x')\n    raise ValueError"
    assert passed_share(program, TESTS) == 0
    assert passed_share(seen, TESTS) == 0


def test_a_sandbox_that_cannot_fork_is_no_0(monkeypatch):
    monkeypatch.setattr(code_tests.Child, "call", lambda *_: {"said": None, "fault": "no memory", "dirty": False})
    with pytest.raises(CallFailed, match="no memory"):
        passed_share(RIGHT, TESTS)


def processes(pid: int) -> list[int]:
    """``pid`` and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in processes(int(child)))]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def within_5_s(holds) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


HANGING = """
import threading, time
from rollout.sandbox import PROGRAMS, SANDBOX_LIMITS, Child
child = Child({"function": None}, "code_tests", SANDBOX_LIMITS, sandboxed=True, main=PROGRAMS)
call = {"step": "run", "sources": ["import time; time.sleep(300)"], "given": "", "timeout_s": 300}
threading.Thread(target=lambda: child.call(call, 300), daemon=True).start()
print(child._process.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("ended", ["child", "parent"])
def test_no_process_stays_when_a_sandbox_or_its_worker_is_killed(ended):
    parent = subprocess.Popen([sys.executable, "-c", HANGING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert within_5_s(lambda: len(processes(child)) >= 3)  # bubblewrap, the harness, the program.
    pids = processes(child)
    if ended == "child":
        os.killpg(child, 9)
    else:
        parent.kill()
    assert within_5_s(lambda: all(map(gone, pids)))
    parent.kill()
    parent.wait()
    parent.stdout.close()


# --- what a process of a test may do ---

HIDDEN = """
import gc, sys
found, frame = [], sys._getframe()
while frame:
    found.append(repr(frame.f_locals))
    frame = frame.f_back
found += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (str, bytes, dict, list))]
print('yes' if any('secret' + '-answer' in text for text in found) else 'no')
"""


def test_expected_answers_are_not_in_the_process_of_a_program():
    tests = {"inputs": ["", "", ""], "outputs": ["secret-answer", "no", "no"]}
    assert passed_share(HIDDEN, tests) == pytest.approx(2 / 3)


ATTACKS = [
    "import os\npid = os.fork()",
    "import subprocess\nsubprocess.run(['/usr/bin/env'])",
    "import os\nos.posix_spawn('/usr/bin/env', ['env'], {})",
    "x = bytearray(600 << 20)",
    "fs = [open('/dev/null') for _ in range(100)]",
    "open('/tmp/big', 'wb').write(bytes(2 << 20))",
    "open('/etc/passwd')",
    "import os\nos.readlink('/proc/1/fd/0')",
    "open('/proc/1/environ').read()",
    "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_walls_and_limits_hold_in_the_process_of_a_test(attack):
    """Each of these would print if it came through."""
    assert passed_share(f"{attack}\nprint('through')", [{"input": "", "output": "through"}]) == 0
    assert passed_share("pass\nprint('through')", [{"input": "", "output": "through"}]) == 1
