"""Early exits: an exit after a block is the output of the model of these blocks, whatever the model is made of."""

from __future__ import annotations

import pytest
import torch
from catalog import BASE, Case, close, name_of, one_of_each, other_inputs, tokens

from x_transformers import TransformerWrapper
from x_transformers.errors import ConfigError

LENGTH = 9


def with_exit(case: Case, stack: str) -> tuple[TransformerWrapper, int]:
    """Build a model of a case with an exit after its first block, or group of these, with a norm of its own where
    there can be one.
    """
    first, more = 1, {}
    if "parallel_blocks" in case.keywords:
        first = case.keywords["parallel_blocks"]
        more = {"depth": 2 * first}
    try:
        return case.build(stack, exit_layers=(first,), exit_norms=True, **more), first
    except ConfigError as error:
        if "copies of the final norm" not in str(error):
            raise
    return case.build(stack, exit_layers=(first,), **more), first


@pytest.mark.parametrize(
    ("stack", "case"), [("encoder", BASE), *one_of_each("decoder", "cross", exempt="exits")], ids=name_of
)
def test_an_exit_is_the_model_of_these_blocks(stack: str, case: Case) -> None:
    """Exits change no output, and see no more than the blocks before them."""
    model, first = with_exit(case, stack)
    x = tokens(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    given = {**other_inputs(model, x), "mask": mask}
    out, exits = model(x, return_exits=True, **given)
    close(out, model(x, **given))
    if not model.attn_layers.skip_sources:
        close(exits[first], model.shallow(first)(x, **given))
