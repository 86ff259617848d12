"""Tests of programs as data sets write them: what each form is read as, what is refused, which answers are the same."""

from __future__ import annotations

import json
import math

import pytest

from rollout.code_answers import same_output, same_value
from rollout.code_forms import Call, Input, parse_tests
from rollout.code_statements import Statement, UnknownTests
from rollout.row_checks import check_code_rows
from shared.config_reward import RewardFunction

CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
HUMANEVAL = f"METADATA = {{'author': 'x'}}\n\n\n{CHECK}"
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]


def cases(tests, **row):
    suite = parse_tests(tests, row)
    assert suite is not None
    return suite.cases


# --- forms ---


@pytest.mark.parametrize(
    "tests",
    [
        ASSERTS,
        tuple(ASSERTS),
        json.dumps(ASSERTS),
        json.dumps(json.dumps(ASSERTS)),
        repr(ASSERTS),
        {"test_list": ASSERTS},
        {"assert_case": ASSERTS, "inputs": [], "outputs": []},
        ["import math", *ASSERTS],
        [f"    {test}" for test in ASSERTS],
    ],
)
def test_a_list_of_statements_has_a_case_each(tests):
    assert cases(tests) == [Statement(test) for test in ASSERTS]


@pytest.mark.parametrize(
    ("tests", "row", "calls", "entry"),
    [
        ("\n".join(ASSERTS), {}, (), ""),
        (HUMANEVAL, {"entry_point": "add"}, (("check", 1),), "add"),
        (HUMANEVAL, {}, (("check", 1),), ""),
        (f"{HUMANEVAL}\ncheck(add)\n", {"entry_point": "add"}, (), "add"),
        (f"{CHECK}\nif __name__ == '__main__':\n    check(add)\n", {}, (("check", 1),), ""),
        (f"{CHECK}\ndef test_check():\n    check(add)\n\ntest_check()\n", {}, (), ""),
        (f"{CHECK}\ndef test_check():\n    check(add)\n", {}, (("test_check", 0),), ""),
        ([HUMANEVAL], {"entry_point": "add"}, (("check", 1),), "add"),
        ({"functional": CHECK}, {"entry_point": "Solution().add"}, (("check", 1),), "Solution().add"),
        (json.dumps({"functional": f"{CHECK}\ncheck(Solution().add)"}), {}, (), ""),
        ({"functional": CHECK, "entry_point": "add"}, {}, (("check", 1),), "add"),
        ("def test_add():\n    assert add(1, 2) == 3\n\ndef test_zero():\n    assert add(0, 0) == 0", {}, (("test_add", 0), ("test_zero", 0)), ""),
    ],
)  # fmt: skip
def test_a_string_that_compiles_is_one_statement_with_the_checks_it_does_not_call(tests, row, calls, entry):
    (case,) = cases(tests, **row)
    assert (case.calls, case.entry_point) == (calls, entry)


def test_classes_of_unittest_are_run_and_a_bare_comparison_is_meant_to_hold():
    (case,) = cases("import unittest\n\nclass TestAdd(unittest.TestCase):\n    def test(self):\n        pass")
    assert case.suites == ("TestAdd",)
    assert cases(["add(1, 2) == 3"]) == [Statement("assert add(1, 2) == 3")]


def test_what_stands_before_the_tests_is_their_setup():
    row = {"test_imports": ["import math"], "test_setup_code": "x = 1"}
    suite = parse_tests(["import re", "def helper():\n    return 1", *ASSERTS], row)
    assert suite.setup == ["import math", "x = 1", "import re", "def helper():\n    return 1"]
    assert len(suite.cases) == 2


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]},
        json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}),
        {"inputs": json.dumps(["1 2\n", "3 4\n"]), "outputs": json.dumps(["3\n", "7\n"])},
        {"inputs": [["1 2"], ["3 4"]], "outputs": [["3"], [7]]},
        {"input": ["1 2\n", "3 4\n"], "output": ["3\n", "7\n"]},
        [{"input": "1 2\n", "output": "3\n"}, {"input": ["3 4"], "output": ["7"]}],
        [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "3 4\n", "output": "7\n", "testtype": "stdin"}],
        {"language": "python", "test_cases": [{"fn_name": None, "type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7\n"}]},
        [json.dumps({"input": "1 2\n", "output": "3\n"}), {"input": "3 4\n", "expected_output": "7\n"}],
        {"fn_name": None, "inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]},
    ],
)  # fmt: skip
def test_cases_of_input_and_output(tests):
    assert cases(tests) == [Input("1 2\n", "3\n"), Input("3 4\n", "7\n")]


@pytest.mark.parametrize(
    ("tests", "row"),
    [
        ({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}, {}),
        (json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}), {}),
        ({"inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}, {"fn_name": "add"}),
        ({"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]}, {}),
        ([{"input": "1\n2", "output": "3", "testtype": "functional"}, {"input": "3\n4\n", "output": "7", "testtype": "functional"}], {"metadata": '{"func_name": "add"}'}),
        ([{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}, {"fn_name": "add", "type": "function_call", "input": [3, 4], "output": 7}], {}),
    ],
)  # fmt: skip
def test_cases_that_call_a_function(tests, row):
    assert cases(tests, **row) == [Call("add", [1, 2], 3), Call("add", [3, 4], 7)]


def test_arguments_that_are_text_or_named():
    assert cases({"fn_name": "f", "inputs": [["12"], {"x": 1}, "a b", 5], "outputs": ["12", 1, "c d", 5]}) == [
        Call("f", ["12"], "12"),
        Call("f", {"x": 1}, 1),
        Call("f", ["a b"], "c d"),
        Call("f", [5], 5),
    ]


UNKNOWN = [
    ("", "no tests"),
    ([], "no tests"),
    ("[]", "no tests"),
    ({"inputs": [], "outputs": []}, "no tests"),
    (["import math"], "no tests"),
    ({}, "an object with no keys"),
    ({"code": "assert 1"}, "an object with code"),
    (["def (:", ASSERTS[0]], 'invalid syntax in line 1 of "def (:"'),
    ("assert add(1, 2) ==", 'invalid syntax in line 1 of "assert add(1, 2) =="'),
    ("return 1", "'return' outside function in line 1 of \"return 1\""),
    ("assert '\0'", "source code string cannot contain null bytes"),
    (CHECK.replace("check", "verify"), "text that tests nothing"),
    ("def test_add(x, y):\n    assert x", "test_add with arguments of pytest"),
    ("@pytest.fixture\ndef test_add():\n    assert x", "test_add with arguments of pytest"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
    ({"inputs": {"a": 1}, "outputs": ["1"]}, "inputs: dict, outputs: list"),
    ({"inputs": [[[1, 2]]], "outputs": ["3"]}, "input [[1, 2]]"),
    ([{"input": "1", "output": None}], "output None"),
    ([{"input": "1", "output": "1", "testtype": "functional"}], "testtype functional without a function's name"),
    ([1, 2], "a list with int 1"),
    ([None], "a list with NoneType None"),
    (3, "int 3"),
    ("x = 1", "text that tests nothing"),
    ("eJxrYJkaxsgABhE9+z/abc", "text that tests nothing"),  # Compressed, as LiveCodeBench has its private tests.
]


@pytest.mark.parametrize(("tests", "found"), UNKNOWN)
def test_what_has_no_known_form_is_refused_and_no_failed_test(tests, found):
    with pytest.raises(UnknownTests) as excinfo:
        parse_tests(tests, {})
    assert found in excinfo.value.found


def test_setup_code_that_does_not_compile_is_refused():
    with pytest.raises(UnknownTests, match="invalid syntax"):
        parse_tests(ASSERTS, {"test_setup_code": "def ("})


# --- rows ---


def checked(rows, *functions):
    functions = functions or ({"function": "code_tests"},)
    specs = [RewardFunction.model_validate(function) for function in functions]
    return [
        str(problem) for problem in check_code_rows(specs, [(f"r.jsonl:{i}", row) for i, row in enumerate(rows, 1)])
    ]


def test_rows_whose_tests_are_not_understood_are_one_error_that_names_the_first():
    (line,) = checked([{"tests": ASSERTS}, {"tests": ["def ("]}, {"tests": []}])
    assert line.startswith("error[E206] tests not understood — r.jsonl:2:tests (and 1 more). Found ")
    assert 'Found invalid syntax in line 1 of "def (", expected statements that compile' in line
    assert checked([{"tests": ASSERTS}]) == []
    assert checked([{"tests": [1]}], {"function": "exact_match"}) == []
    (line,) = checked([{"checks": [1]}], {"function": "code_tests", "args": {"column": "checks"}})
    assert "r.jsonl:1:checks" in line


def test_a_row_without_tests_is_wrong_where_nothing_else_scores_it():
    rows = [{"tests": ASSERTS}, {"tests": None}, {}]
    (line,) = checked(rows)
    assert "r.jsonl:2:tests (and 1 more). Found no tests" in line
    assert checked(rows, {"function": "code_tests"}, {"function": "exact_match"}) == []
    assert checked([{}, {}]) == []  # The column is another source's.


# --- answers ---


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("3 \r\n\n 4", "3\n4\n", True),
        ("1   2", "1 2", True),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("", "0", False),
        ("0.5", "0.50000", True),
        ("0.3333333", "0.333333", True),
        ("0.51", "0.50000", False),
        ("1e-3", "0.001", True),
        ("-0.0", "0.0", True),
        ("1234.51", "1234.50", False),
        ("3.0", "3", True),
        ("3", "3.0", True),
        ("3.5", "3", False),
        ("1000000007.0", "1000000008", False),
        ("1000000008", "1000000007", False),
        ("0101", "101", False),
        ("12345678901234567890123", "12345678901234567890124", False),
        ("nan", "0.5", False),
        ("1", "1e9999", False),
        ("1e9999", "1e9998", False),
        ("YES", "Yes", False),
        ("1_0.0", "10.0", False),
        ("x 0.5", "x .5", True),
    ],
)
def test_printed_answers(said, wanted, same):
    assert same_output(said, wanted) is same


DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        (3, 3, True),
        (3, 4, False),
        (3.0, 3, True),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        ([0.1 + 0.2], [0.3], True),
        (1000000007.0, 1000000008, False),
        (10**400, 1.5, False),
        (10**400, 10**400, True),
        ("3", 3, False),
        (3, "3", False),
        ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        ({"1": [0.5]}, {"1": [0.5000000001]}, True),
        ({"a": 1}, {"b": 1}, False),
        (3, [3], True),
        ([3], [[3]], True),
        (3, [3, 4], False),
        (None, None, True),
        (None, 0, False),
        (True, 1.0000001, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (1.0, math.inf, False),
        (math.inf, 7, False),
        (DEEP, [DEEP, 1], False),
        (DEEP, 1, False),
    ],
)
def test_returned_answers(value, wanted, same):
    assert same_value(value, wanted) is same
