"""Pairs: options keep every promise together, or are refused in words. `python tests/pairs.py` judges all pairs."""

import functools
import inspect
import itertools

import pytest
from catalog import Case
from pairs import covering_sample, judge_row, together
from table import CROSS, ELSEWHERE, FAMILIES, NOT_IN, OPTIONS, REFUSED, cases_of, may_meet, pairs_of, refused

from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError

PARTS = 4
"""The sample is divided, so that several workers share it."""

STACKS = pytest.mark.parametrize("stack", NOT_IN)
sample = functools.cache(covering_sample)


def test_every_keyword_has_a_row() -> None:
    rows = (*OPTIONS.values(), *CROSS.values())
    written = {keyword for row in rows for keyword in row}
    keywords = {name for made in (Decoder, TransformerWrapper) for name in inspect.signature(made).parameters}
    # what `cross_attn_` says of one attention is what `attn_` says of the other
    overrides = {name for name in keywords if name.startswith("cross_attn_") and name[6:] in keywords}
    assert written | ELSEWHERE.keys() | overrides == keywords
    assert not written & ELSEWHERE.keys()


def test_names_are_those_of_rows() -> None:
    names = OPTIONS.keys() | CROSS.keys()
    families = {name for groups in FAMILIES.values() for group in groups for name in group.split()}
    refusals = {name for one, others in REFUSED.items() for name in (one, *others.split())}
    assert families | refusals | {name for rows in NOT_IN.values() for name in rows} <= names


@STACKS
def test_rows_of_other_stacks_are_refused(stack: str) -> None:
    for name in NOT_IN[stack]:
        with pytest.raises(ConfigError):
            Case(name, (), OPTIONS[name]).build(stack)


@STACKS
def test_pairs_that_mean_nothing_are_few_and_refused(stack: str) -> None:
    pairs = list(pairs_of(stack))
    listed = [pair for pair in pairs if refused(*pair)]
    assert len(listed) < 0.02 * len(pairs)
    for pair in listed:
        with pytest.raises(ConfigError):
            together(pair).build(stack)


@STACKS
def test_every_other_pair_occurs_in_the_sample(stack: str) -> None:
    occurring = {pair for row in sample(stack) for pair in itertools.combinations(row, 2)}
    for pair in pairs_of(stack):
        assert pair in occurring or refused(*pair), f"{pair[0]} and {pair[1]} do not occur"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@STACKS
@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample_in_which_every_pair_occurs(stack: str, part: int) -> None:
    verdicts = [verdict for row in sample(stack)[part::PARTS] for verdict in judge_row(row, stack)]
    wrong = [f"{verdict.name}\n    {verdict.words}" for verdict in verdicts if verdict.kind != "right"]
    assert not wrong, "\n".join(wrong)


def test_alternatives_and_contradictions_are_no_pairs() -> None:
    rows = {case.name: case for case in cases_of("decoder")}
    assert may_meet(rows["alibi_pos_bias"], rows["rotary_pos_emb"])
    assert may_meet(rows["rotary_pos_emb"], rows["rotate_num_heads"])
    assert not may_meet(rows["alibi_pos_bias"], rows["rel_pos_bias"])
    assert not may_meet(rows["num_memory_tokens"], rows["memory_tokens_interspersed_every"])
    assert not may_meet(rows["attn_gate_values"], rows["attn_gate_values_headwise"])
