"""Which stop strings are tokens and which are text."""

from __future__ import annotations

import pytest

from launch.builtin import TASKS, make_tokenizer
from rollout.stop_strings import stop_arguments


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TASKS["addition"])


@pytest.mark.parametrize(
    ("strings", "texts", "ids"),
    [
        ([], None, None),
        (["<|user|>"], None, [3]),
        (["<|user|>", "<|end|>", "<|user|>"], None, [1, 3]),
        (["7"], ["7"], None),  # A token, and also the beginning of others: text finds it everywhere.
        (["<|user|>7", "<|system|>"], ["<|user|>7"], [2]),
        (["x"], ["x"], None),  # Unknown to the tokenizer, whose token for that is a special one.
        (["<|nobody|>"], ["<|nobody|>"], None),
    ],
)
def test_a_special_token_is_a_stop_token_and_the_rest_is_text(tokenizer, strings, texts, ids):
    arguments = stop_arguments(strings, tokenizer)
    assert (arguments["stop"], arguments["stop_token_ids"]) == (texts, ids)
    assert arguments["detokenize"] == bool(texts)
    assert arguments["skip_special_tokens"] != bool(texts)  # Else a string with a special token in it never matches.
