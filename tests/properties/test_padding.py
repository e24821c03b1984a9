"""Padding: a row of a ragged batch equals the row by itself, whatever its padding contains."""

import pytest
import torch
from catalog import BASE, Case, call, cases, close, context_width, contexts, name_of, one_of_each, tokens
from promises import LENGTH, another, decodes_ragged, pads

from x_transformers import CrossAttender, Decoder, Encoder, TransformerWrapper

EVERY = pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross", exempt="padding"), ids=name_of)


@EVERY
def test_right_padding(stack: str, case: Case) -> None:
    pads(case.build(stack), left=False)


@EVERY
def test_left_padding(stack: str, case: Case) -> None:
    pads(case.build(stack), left=True)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="padding"), ids=name_of)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padding_through_a_cache(stack: str, case: Case, kind: str) -> None:
    decodes_ragged(case.build(stack), static=kind == "static")


@EVERY
@torch.no_grad()
def test_hidden_tokens_do_not_matter(stack: str, case: Case) -> None:
    """Holes included, with either mask; the output of the hidden token itself may change."""
    model = case.build(stack)
    ids = tokens(2, LENGTH)
    shown = torch.rand(2, LENGTH) > 0.4
    shown[:, 0] = True
    other = torch.where(shown, ids, another(ids))
    for name in ("mask", "self_attn_kv_mask"):
        moved = call(model, other, **{name: shown}) - call(model, ids, **{name: shown})
        close(moved[shown], torch.zeros_like(moved[shown]))


@EVERY
@torch.no_grad()
def test_left_padding_does_not_matter(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids, start = tokens(2, LENGTH), torch.tensor([0, 4])
    real = torch.arange(LENGTH) >= start[:, None]
    other = torch.where(real, ids, another(ids))
    close(call(model, other, seq_start_pos=start)[real], call(model, ids, seq_start_pos=start)[real])


@pytest.mark.parametrize(("stack", "case"), cases("cross", exempt="padding"), ids=name_of)
@torch.no_grad()
def test_context_masks(stack: str, case: Case) -> None:
    """A padded context is the shorter context; a row that sees no context at all stays finite."""
    model = case.build(stack)
    ids = tokens(3, 4)
    lengths = torch.tensor([5, 2, 0])
    context = contexts(context_width(model))[:3]
    together = call(model, ids, context=context, context_mask=torch.arange(5) < lengths[:, None])
    assert together.isfinite().all()
    for row in (0, 1):
        alone = call(model, ids[row : row + 1], [row], context=context[row : row + 1, : lengths[row]])
        close(together[row : row + 1], alone)


@torch.no_grad()
def test_masks_combine() -> None:
    model = BASE.build("encoder")
    ids = tokens(2, 6)
    one, two, start = torch.rand(2, 6) > 0.3, torch.rand(2, 6) > 0.3, torch.tensor([0, 2])
    one[:, 3] = two[:, 3] = True
    real = torch.arange(6) >= start[:, None]
    together = call(model, ids, mask=one, self_attn_kv_mask=two, seq_start_pos=start)
    both = one & two & real
    other = torch.where(both, ids, another(ids))
    kept = one & two & real
    close(call(model, other, mask=one, self_attn_kv_mask=two, seq_start_pos=start)[kept], together[kept])


@torch.no_grad()
def test_integers_are_masks_too() -> None:
    model = BASE.build()
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    close(model(ids, mask=mask), model(ids, mask=mask.bool()))


@pytest.mark.parametrize("flash", [None, False, True])
@torch.no_grad()
def test_rows_without_visible_keys_are_zero(flash: bool | None) -> None:
    """Mask and causality together may hide every key of a query; attention then gives 0 there."""
    model = BASE.build(attn_flash=flash, attn_num_mem_kv=0)
    attention = model.attn_layers.branches("a")[0].attention
    x, mask = torch.randn(1, 5, 16), torch.tensor([[False, False, True, True, True]])
    out = attention(x, attn_mask=mask[:, None, None])
    assert (out[:, :2] == 0).all()
    assert out.isfinite().all()
    assert (out[:, 2:].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("flash", [None, False, True])
@torch.no_grad()
def test_attention_of_hidden_tokens_is_zero(flash: bool | None) -> None:
    """With `mask`, the output of attention is zero for every token that it hides, and for no other one."""
    model = BASE.build(attn_flash=flash)
    attention = model.attn_layers.branches("a")[0].attention
    x, mask = torch.randn(2, 5, 16), torch.arange(5) < torch.tensor([[3], [5]])
    out = attention(x, mask=mask)
    assert torch.equal((out == 0).all(dim=-1), ~mask)
    stack = Encoder(dim=16, depth=1, heads=4, only_attn=True, pre_norm_has_final_norm=False, attn_flash=flash).eval()
    moved = stack(x, mask=mask) - x
    assert torch.equal((moved == 0).all(dim=-1), ~mask)


@torch.no_grad()
def test_a_stack_pads_as_a_model_does() -> None:
    keywords = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
    x, start, mask = torch.randn(2, 7, 16), torch.tensor([0, 3]), torch.arange(7) < torch.tensor([[7], [4]])
    for stack in (Decoder(**keywords, alibi_pos_bias=True).eval(), Encoder(**keywords, rotary_pos_emb=True).eval()):
        close(stack(x, seq_start_pos=start)[1:, 3:], stack(x[1:, 3:]))
        close(stack(x, mask=mask)[1:, :4], stack(x[1:, :4]))
    stack = CrossAttender(**keywords).eval()
    close(stack(x, context=x, context_mask=mask)[1:], stack(x[1:], context=x[1:, :4]))


@torch.no_grad()
def test_absolute_positions_count_from_each_rows_first_token() -> None:
    model: TransformerWrapper = BASE.build()
    ids = tokens(1, 4)
    padded = torch.cat((tokens(1, 28), ids), dim=1)
    close(model(padded, seq_start_pos=torch.tensor([28]))[:, 28:], model(ids))
