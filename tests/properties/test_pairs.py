"""Pairs: features keep every promise together, or are refused in words. `python tests/pairs.py` runs all pairs."""

import itertools

import pytest
from catalogue import CASES, Case
from pairs import builds, covering_sample, foundation_pairs, judge, may_meet

REFUSED = {
    ("factorised_embedding-1", "tied_embedding-1"),
    ("grouped_heads-1", "rotary-3"),
    ("grouped_heads-2", "rotary-3"),
    ("gate_residual-1", "residual_scale-3"),
    ("logits_dim-1", "tied_embedding-1"),
    ("memory_kv-1", "rotary-4"),
    # `rel_pos_kwargs` with ALiBi's slopes, beside another bias or another number of slopes
    ("alibi-2", "stack-1"),
    ("dynamic_bias-1", "stack-1"),
    ("dynamic_bias-2", "stack-1"),
    ("stack-1", "t5_bias-1"),
}
"""Every pair that cannot mean anything together; the list is kept so that nobody refuses more by accident."""


def test_refused_pairs_are_these() -> None:
    refused = {tuple(sorted((one.name, two.name))) for one, two in foundation_pairs() if not builds(one, two)}
    assert refused == REFUSED


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_a_sample_in_which_every_pair_occurs() -> None:
    sample = list(covering_sample())
    together = {frozenset(pair) for case in sample for pair in itertools.combinations(parts(case), 2)}
    for one, two in foundation_pairs():
        assert not builds(one, two) or {one.name, two.name} in together, f"{one} and {two} do not occur"
    wrong = [verdict for verdict in map(judge, sample) if verdict.kind != "right"]
    assert not wrong, "\n".join(f"{verdict.name}\n    {verdict.words}" for verdict in wrong)


def parts(case: Case) -> list[str]:
    return case.name.split("+")[1:]


def test_pairs_are_of_different_minds() -> None:
    """Alternatives of one choice, examples of one feature and contradicting keywords are no pairs."""
    by_name = {case.name: case for case in CASES}
    assert may_meet(by_name["alibi-1"], by_name["rotary-1"])
    assert not may_meet(by_name["alibi-1"], by_name["t5_bias-1"])
    assert not may_meet(by_name["alibi-1"], by_name["alibi-2"])
    assert not may_meet(by_name["memory_tokens-1"], by_name["interspersed_memory_tokens-1"])
