"""Key/value heads: with fewer of them every promise holds, and query heads share them."""

import pytest
import torch
from catalog import BASE, HEADS, Case, call, close, name_of, one_of_each, tokens
from promises import decodes, decodes_ragged, keeps_the_past, learns, pads

from x_transformers import TransformerWrapper
from x_transformers.errors import ConfigError

NOT_GROUPED = {
    "rotary-3": "`rotate_num_heads` needs as many kv heads as heads",
    "latent-2": "`attn_latent_rope_subheads` is 2; there are 1 key/value heads",
    "latent-3": "`attn_latent_rope_subheads` is 4; there are",
    **dict.fromkeys(("gin-1", "gin-2", "gin-3"), "has a slice of the input for each of the 4 heads"),
}


def grouped(case: Case, kv_heads: int, stack: str = "decoder") -> TransformerWrapper | None:
    """Build the case with this number of kv heads; return None if it is refused as listed."""
    number = {"attn_kv_heads": kv_heads, "attn_one_kv_head": False}
    try:
        return case.build(stack, **number)
    except ConfigError as error:
        if kv_heads == HEADS or NOT_GROUPED.get(case.name, "never") not in str(error):
            raise
        return None


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="kv_heads"), ids=name_of)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_promises(stack: str, case: Case, kv_heads: int) -> None:
    model = grouped(case, kv_heads, stack)
    if model is not None:
        keeps_the_past(model)
        decodes(model, static=False)
        decodes(model, static=True)
        decodes_ragged(model, static=False)
        pads(model, left=False)
        learns(model, case.without_gradient())


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="shared_heads"), ids=name_of)
@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_shared_heads_are_equal_heads(stack: str, case: Case, kv_heads: int) -> None:
    """A model with shared heads equals one whose heads hold copies of them: query head h reads h // (heads / g)."""
    model = grouped(case, kv_heads, stack)
    if model is None:
        return
    twin = case.build(stack, attn_kv_heads=HEADS, attn_one_kv_head=False)
    state, wanted = model.state_dict(), twin.state_dict()
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            axis = next(i for i, (a, b) in enumerate(zip(tensor.shape, wanted[name].shape, strict=True)) if a != b)
            split = tensor.unflatten(axis, (kv_heads, -1)).repeat_interleave(HEADS // kv_heads, dim=axis)
            state[name] = split.flatten(axis, axis + 1)
    twin.load_state_dict(state)
    ids = tokens(2, 8)
    close(call(model, ids), call(twin, ids))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kv_heads` is 3; it must divide the 4 heads"):
        BASE.build(attn_kv_heads=3)
    with pytest.raises(ConfigError, match="keep one of them"):
        BASE.build(attn_kv_heads=2, attn_one_kv_head=True)
