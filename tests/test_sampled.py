"""The distribution that tokens were sampled from: filters against a naive copy of vLLM's, values, exact gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import logprobs as under_test
from learner.batching import Row, collate
from learner.logprobs import PolicyModel, Sampled, _TokenLogProbs
from shared.types import Completion, Prompt

CPU = torch.device("cpu")
torch.set_num_threads(1)
FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_k": 2},
    {"top_k": 99},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.6, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.7, "top_k": 3, "top_p": 0.9, "min_p": 0.3},
]
every_filter = pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))


def naive(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probs of one row in vLLM's order: temperature, min_p, top_k, top_p; -inf where a filter removes."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept = p >= min_p * p.max()
    if top_k:
        best = np.sort(np.where(kept, logits, -np.inf))[::-1]
        kept &= logits >= best[min(top_k, len(best)) - 1]
    if top_p < 1:
        q = np.where(kept, p, 0) / p[kept].sum()
        mass = 0.0
        for token in np.argsort(-logits):  # Likeliest first, until the mass is reached; at least one.
            if mass >= top_p:
                kept[token] = False
            mass += q[token]
    with np.errstate(divide="ignore"):
        return np.log(np.where(kept, p, 0) / p[kept].sum())


def log_softmax(logits, **filters):
    """``Sampled`` on given logits: the head is the identity."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    return Sampled(**filters).log_softmax(logits, torch.eye(logits.shape[1], dtype=torch.float64))


# --- values ---


@pytest.mark.parametrize(
    ("filters", "value"), [({}, -0.407606), ({"temperature": 0.5}, -0.142932), ({"top_k": 2}, -0.313262)]
)
def test_the_example_of_the_maths(filters, value):
    assert float(log_softmax([[2.0, 1.0, 0.0]], **filters)[0, 0]) == pytest.approx(value, abs=1e-6)
    factor = math.exp(float(log_softmax([[2.0, 1.0, 0.0]])[0, 0] - log_softmax([[2.0, 1.0, 0.0]], top_k=2)[0, 0]))
    assert factor == pytest.approx(0.909969, abs=1e-6)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        # Probabilities 0.1, 0.4, 0.2, 0.3.
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.001}, [1]),
        ({"top_p": 1e-18}, [1]),  # At least one stays, also where 1 - top_p rounds to 1.
        ({"min_p": 0.51}, [1, 3]),
        ({"min_p": 0.49}, [1, 2, 3]),
        ({"min_p": 1.0}, [1]),
        # After top_k = 2 the nucleus is of 4/7 and 3/7: 0.5 keeps one, where of the whole it would keep two.
        ({"top_k": 2, "top_p": 0.5}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        # min_p looks at probabilities after the temperature: squared, 0.09 is 0.56 of 0.16.
        ({"min_p": 0.6, "temperature": 0.5}, [1]),
        ({"min_p": 0.6}, [1, 3]),
    ],
)
def test_what_a_filter_keeps(filters, kept):
    found = log_softmax(np.log([[0.1, 0.4, 0.2, 0.3]]), **filters)[0]
    assert torch.isfinite(found).nonzero()[:, 0].tolist() == kept
    assert float(found.exp().sum()) == pytest.approx(1)


@every_filter
@given(logits=st.lists(st.floats(-9, 9), min_size=2, max_size=12, unique_by=lambda x: round(x, 3)))
def test_filters_equal_a_naive_copy_of_vllm(filters, logits):
    expected = naive(logits, **filters)
    found = log_softmax([logits, logits], **filters)
    assert torch.equal(found[0], found[1])
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)


def test_bfloat16_logits_are_normalised_in_float32():
    hidden = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    found = Sampled(0.5, top_k=2).log_softmax(hidden, torch.eye(3, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert float(found[0, 0]) == pytest.approx(-math.log1p(math.exp(-2)), abs=1e-6)


# --- the head's autograd function ---


def head_inputs(count=7, width=5, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, reference_hidden, reference = (
        torch.randn(rows, width, dtype=torch.float64, generator=generator)
        for rows in (count, vocabulary, count, vocabulary)
    )
    return hidden.requires_grad_(), weight.requires_grad_(), (reference_hidden, reference)


def naive_head(hidden, weight, labels, filters, reference):
    """The same three outputs from the formulas, by autograd; the kept set, which is constant, from numpy."""

    def log_p_of(states, head):
        logits = states @ head.T
        kept = np.stack([np.isfinite(naive(row, **filters)) for row in logits.detach().numpy()])
        kept = torch.from_numpy(kept)
        return torch.log_softmax((logits / filters.get("temperature", 1.0)).masked_fill(~kept, -torch.inf), 1), kept

    log_p, kept = log_p_of(hidden, weight)
    finite = torch.where(kept, log_p, 0.0)
    p = torch.where(kept, finite.exp(), 0.0)
    entropy = -(p * finite).sum(1)
    kl = torch.zeros_like(entropy)
    if reference is not None:
        kl = (p * (finite - log_p_of(*reference)[0])).sum(1)
    return log_p.gather(1, labels[:, None])[:, 0], entropy, kl


def kept_labels(hidden, weight, filters):
    """The second likeliest token of each row where the filters keep it, else the likeliest."""
    logits = (hidden @ weight.T).detach().numpy()
    best, second = np.argsort(-logits, axis=1)[:, :2].T
    kept = [np.isfinite(naive(row, **filters)[token]) for row, token in zip(logits, second, strict=True)]
    return torch.from_numpy(np.where(kept, second, best))


# A KL of truncated distributions is refused in the configuration.
OUTPUTS = {"logprobs": [0], "entropy": [1], "kl": [2], "all": [0, 1, 2], "both": [0, 1]}
CASES = [(f, n) for f in FILTERS for n in OUTPUTS if set(f) <= {"temperature"} or 2 not in OUTPUTS[n]]


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize(("filters", "output"), CASES)
def test_values_and_gradients_are_those_of_the_formulas(monkeypatch, output, filters, chunk_rows):
    hidden, weight, reference = head_inputs()
    monkeypatch.setitem(under_test.CHUNK_BYTES, "cpu", 4 * len(weight) * chunk_rows)
    reference = reference if 2 in OUTPUTS[output] else None
    labels = kept_labels(hidden, weight, filters)
    expected = naive_head(hidden, weight, labels, filters, reference)
    found = _TokenLogProbs.apply(hidden, weight, labels, Sampled(**filters), reference)
    factors = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    totals = [sum((k + 1) * (outputs[k] * factors).sum() for k in OUTPUTS[output]) for outputs in (found, expected)]
    gradients = [torch.autograd.grad(total, (hidden, weight)) for total in totals]
    for x, y in zip(*gradients, strict=True):
        assert y.abs().max() > 1e-3
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_a_label_outside_the_kept_set_has_log_prob_minus_infinity_and_masked_no_gradient():
    hidden, weight, _ = head_inputs()
    labels = (hidden @ weight.T).argsort(1, descending=True)[:, 3]
    logprobs, entropy, _ = _TokenLogProbs.apply(hidden, weight, labels, Sampled(top_k=3), None)
    assert torch.equal(logprobs, torch.full_like(logprobs, -torch.inf))
    inside = torch.isfinite(logprobs)
    total = torch.where(inside, logprobs, 0.0).sum() + entropy.sum()
    expected = naive_head(hidden, weight, labels, {"top_k": 3}, None)[1].sum()
    for x, y in zip(*(torch.autograd.grad(t, (hidden, weight)) for t in (total, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


# --- in the model ---


class Table(torch.nn.Module):
    """A language model whose output depends on the last token alone; what ``PolicyModel`` needs of one."""

    def __init__(self, seed, vocabulary=11, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(vocabulary, width, dtype=torch.float64)
        self.head = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)

    def base_model(self, input_ids, **_):
        return type("Output", (), {"last_hidden_state": self.embedding(input_ids)})

    def get_output_embeddings(self):
        return self.head


def test_the_third_output_is_the_kl_to_a_reference_by_token():
    policy, reference = (PolicyModel(Table(seed), Sampled(0.7)) for seed in (0, 1))
    prompt = Prompt(0, np.array([3, 4], np.int32), "")
    answers = [np.array([1, 2, 5], np.int32), np.array([7], np.int32)]
    rows = [
        Row(prompt, Completion(a, np.zeros(len(a), np.float32), "", "stop"), i, 0, 3) for i, a in enumerate(answers)
    ]
    tokens = collate(rows, CPU).tokens
    (hidden,) = reference(tokens, hidden_only=True)
    assert hidden.shape == (4, 6)
    logprobs, _, kl = policy(tokens, (hidden, reference.head))
    before = torch.tensor([[4, 1, 2], [4, 4, 4]])
    log_p, log_q = (torch.log_softmax(m.model.head(m.model.embedding(before)) / 0.7, -1) for m in (policy, reference))
    inside = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    expected = torch.where(inside, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0)
    torch.testing.assert_close(kl, expected, rtol=0, atol=1e-12)
    labels = torch.tensor([[1, 2, 5], [7, 0, 0]])
    picked = torch.where(inside, log_p.gather(2, labels[..., None])[..., 0], 0.0)
    torch.testing.assert_close(logprobs, picked, rtol=0, atol=1e-12)
    found = torch.autograd.grad((kl * torch.arange(6).view(2, 3)).sum(), list(policy.parameters()))
    by_hand = torch.autograd.grad((expected * torch.arange(6).view(2, 3)).sum(), list(policy.parameters()))
    for x, y in zip(found, by_hand, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    itself = policy(tokens, (policy(tokens, hidden_only=True)[0], policy.head))[2]
    assert float(itself.detach().abs().max()) < 1e-15
