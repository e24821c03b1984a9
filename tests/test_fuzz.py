"""No constructor and no call ends in an exception but ours, and nothing that cannot be meant is taken.

CI tries a part of the hostile values of `fuzz.py` and of the tables that extend it, drawn by hypothesis;
`pytest tests/test_fuzz.py --long` tries them, and pairs of arguments, for hours.
"""

from __future__ import annotations

import os

import fuzz_objectives  # noqa: F401
import fuzz_parts  # noqa: F401
import pytest
import torch
from fuzz import CALLS, CONSTRUCTORS, NEVER_OPTIONS, OPTION_VALUES, build, hostile_calls, parameters, try_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONG = os.environ.get("XT_FUZZ") == "long"
EXAMPLES = settings(
    derandomize=True,
    max_examples=1_000_000 if LONG else 40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HOSTILE = {name: list(hostile_calls(name)) for name in CALLS}


@pytest.mark.parametrize("name", CONSTRUCTORS)
@EXAMPLES
@given(data=st.data())
def test_constructors(name: str, data: st.DataObject) -> None:
    """Two options at a time: an error about one of them must not hide what the other does."""
    keywords = data.draw(st.lists(st.sampled_from(parameters(CONSTRUCTORS[name][0])), min_size=1, max_size=2))
    given = {keyword: data.draw(st.sampled_from(OPTION_VALUES)) for keyword in keywords}
    found = build(name, given)
    never = any(value is each for value in given.values() for each in NEVER_OPTIONS)
    assert found is None or (found == "taken" and not never), f"{name}({given}): {found}"


@pytest.mark.parametrize("name", CALLS)
@EXAMPLES
@given(data=st.data())
def test_calls(name: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    what, arguments, refused = data.draw(st.sampled_from(HOSTILE[name]))
    found = try_call(name, arguments)
    assert found is None or (found == "taken" and not refused), f"{what}: {found}"


def test_valid_calls_work() -> None:
    """The calls that are damaged above."""
    for name, call in CALLS.items():
        assert try_call(name, call.arguments()) == "taken", name
