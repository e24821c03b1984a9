"""Prefix slots: memory tokens and prepended embeddings work with every argument over tokens."""

import pytest
import torch
from catalog import BASE, Case, call, close, name_of, one_of_each, tokens
from promises import LENGTH, another
from torch import Tensor

from x_transformers import TransformerWrapper
from x_transformers.errors import InputError, ShapeError

P = 3
DECODERS = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="prefix"), ids=name_of)
EVERY = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "encoder", exempt="prefix"), ids=name_of)
FRAMES = {
    "none": {},
    "memory": {"num_memory_tokens": 2},
    "interspersed": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4},
}
FRAMED = pytest.mark.parametrize("frame", FRAMES)
PREPENDED = pytest.mark.parametrize("count", [0, P], ids=["alone", "prepended"])


def framed(frame: str, **more: object) -> TransformerWrapper:
    return BASE.build(**FRAMES[frame], **more)


def prepended(model: TransformerWrapper, count: int, rows: int = 2) -> dict[str, Tensor]:
    return {"prepend_embeds": torch.randn(rows, count, model.emb_dim)} if count else {}


@EVERY
@torch.no_grad()
def test_prepended_embeddings_are_tokens_in_front(stack: str, case: Case) -> None:
    """Their outputs can be cut off; a hidden one does not matter; rows stay apart."""
    model = case.build(stack)
    ids, embeds = tokens(2, LENGTH), torch.randn(2, P, model.emb_dim)
    whole = call(model, ids, prepend_embeds=embeds)
    assert whole.shape[1] == P + LENGTH
    close(call(model, ids, prepend_embeds=embeds, excise_prepend_embeds=True), whole[:, P:])
    shown = torch.tensor([[True, True, False], [True, True, True]])
    one = call(model, ids, prepend_embeds=embeds, prepend_mask=shown)
    other = torch.where(shown[..., None], embeds, torch.randn_like(embeds))
    two = call(model, ids, prepend_embeds=other, prepend_mask=shown)
    close(two[:, P:], one[:, P:])
    close(one[1], whole[1])


@DECODERS
@torch.no_grad()
def test_a_left_padded_row_is_the_row_alone_behind_a_prefix(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids, embeds = tokens(2, LENGTH), torch.randn(2, P, model.emb_dim)
    together = call(model, ids, prepend_embeds=embeds, seq_start_pos=torch.tensor([0, 4]))
    alone = call(model, ids[1:, 4:], [1], prepend_embeds=embeds[1:])
    close(together[1:, P + 4 :], alone[:, P:])
    close(together[1:, :P], alone[:, :P])


@FRAMED
@PREPENDED
@torch.no_grad()
def test_full_arguments_change_nothing(frame: str, count: int) -> None:
    """Masks that hide nothing, biases of zero, the usual positions: each by itself."""
    model = framed(frame, rotary_pos_emb=True)
    ids = tokens(2, LENGTH)
    front = prepended(model, count)
    wanted = model(ids, **front)
    everything = torch.ones(2, LENGTH, dtype=torch.bool)
    pairs = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for given in (
        {"mask": everything},
        {"self_attn_kv_mask": everything},
        {"attn_mask": pairs},
        {"attn_mask": pairs.expand(4, -1, -1)},
        {"attn_mask": pairs.expand(2, 4, -1, -1)},
        {"attn_mask": pairs[:1]},
        {"attn_bias": torch.zeros(LENGTH, LENGTH)},
        {"attn_bias": torch.zeros(4, LENGTH, LENGTH)},
        {"pos": torch.arange(LENGTH)},
        {"pos": torch.arange(LENGTH).expand(2, -1)},
        {"seq_start_pos": torch.zeros(2, dtype=torch.long)},
    ):
        close(model(ids, **front, **given), wanted)


@FRAMED
@PREPENDED
@torch.no_grad()
def test_factors_of_feedforwards_are_those_of_tokens(frame: str, count: int) -> None:
    """A table of ones changes nothing; a row of it changes its token, and nothing that came before."""
    model = framed(frame, rotary_pos_emb=True, ff_deep_embed=True)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    ids[:, :5], ids[:, 5:] = ids[:, :5] % 12, ids[:, 5:] % 12 + 12
    model.ff_deep_embed.fill_(1.0)
    plain = model(ids, **front)
    model.ff_deep_embed[12:] = 2.0
    moved = (model(ids, **front) - plain).abs().amax(dim=(0, 2))
    assert (moved[: count + 5] < 1e-5).all()
    assert (moved[count + 5 :] > 1e-4).all()


@FRAMED
@PREPENDED
@torch.no_grad()
def test_one_column_speaks_of_every_token(frame: str, count: int) -> None:
    """A pairwise tensor with one column is the same for every key that is a token, and nothing for the prefix."""
    model = framed(frame, rotary_pos_emb=True)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    for name, column in (("attn_bias", torch.randn(4, LENGTH, 1)), ("attn_mask", torch.rand(LENGTH, 1) > 0.3)):
        whole = column.expand(*column.shape[:-1], LENGTH)
        got = model(ids, **{name: column}, **front)
        close(got, model(ids, **{name: whole}, **front))
        if count:
            assert not torch.allclose(got, model(ids, **front), atol=1e-4)


@FRAMED
@PREPENDED
@torch.no_grad()
def test_pairwise_masks_hide_tokens_from_tokens(frame: str, count: int) -> None:
    """A token that no other may see moves only itself and what the prefix carries; here: nothing behind it."""
    model = framed(frame, rotary_pos_emb=True, depth=1)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    hidden = 5
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask[:, hidden] = False
    mask[hidden, hidden] = True
    changed = ids.clone()
    changed[:, hidden] = another(ids)[:, hidden]
    moved = model(changed, attn_mask=mask, **front) - model(ids, attn_mask=mask, **front)
    moved = moved.abs().amax(dim=(0, 2)) > 1e-5
    assert moved.nonzero().flatten().tolist() == [count + hidden]


@FRAMED
@PREPENDED
@torch.no_grad()
def test_a_bias_is_a_soft_mask(frame: str, count: int) -> None:
    model = framed(frame, rotary_pos_emb=True)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    mask = (torch.rand(4, LENGTH, LENGTH) > 0.3) | torch.eye(LENGTH, dtype=torch.bool)
    bias = torch.zeros(4, LENGTH, LENGTH).masked_fill(~mask, -1e6)
    close(model(ids, attn_bias=bias, **front), model(ids, attn_mask=mask, **front))


@FRAMED
@PREPENDED
@torch.no_grad()
def test_masks_hide_behind_a_prefix(frame: str, count: int) -> None:
    model = framed(frame, rotary_pos_emb=True)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    lengths = torch.tensor([LENGTH, 6])
    mask = torch.arange(LENGTH) < lengths[:, None]
    together = model(ids, mask=mask, **front)
    front = {name: t[1:] for name, t in front.items()}
    close(together[1:, : count + 6], model(ids[1:, :6], **front))


@FRAMED
@PREPENDED
@torch.no_grad()
def test_positions_behind_a_prefix(frame: str, count: int) -> None:
    """`pos` speaks of tokens; shifting all of them moves them away from the prefix, and from nothing else."""
    model = framed(frame, rotary_pos_emb=True)
    ids, front = tokens(2, LENGTH), prepended(model, count)
    pos = torch.arange(LENGTH) + 4
    shifted = model(ids, pos=pos, **front)
    if frame != "memory" and not count:  # the memory of a group moves with it, here by one whole group
        close(shifted, model(ids))
    else:
        assert not torch.allclose(shifted, model(ids, **front), atol=1e-4)


@torch.no_grad()
def test_internal_sizes_are_used_as_they_are() -> None:
    model = framed("memory", rotary_pos_emb=True)
    ids = tokens(2, LENGTH)
    size = 2 + LENGTH
    mask = torch.rand(size, size) > 0.3
    mask |= torch.eye(size, dtype=torch.bool)
    bias = torch.zeros(size, size).masked_fill(~mask, -1e6)
    close(model(ids, attn_bias=bias), model(ids, attn_mask=mask))
    assert not torch.allclose(model(ids, attn_mask=mask), model(ids), atol=1e-4)


@FRAMED
@torch.no_grad()
def test_only_prepended_embeddings(frame: str) -> None:
    """Without a single token: None, or an empty row of ids."""
    model = framed(frame)
    embeds = torch.randn(2, P, 16)
    out = model(None, prepend_embeds=embeds)
    assert out.shape == (2, P, 24)
    close(model(tokens(2, 0), prepend_embeds=embeds), out)
    close(model(tokens(2, 4), prepend_embeds=embeds)[:, :P], out)
    with pytest.raises(InputError, match="nothing to run"):
        model(None)


@FRAMED
@torch.no_grad()
def test_features_are_those_of_tokens(frame: str) -> None:
    model = framed(frame)
    ids = tokens(2, LENGTH)
    features, record = model(ids, return_embeddings_and_intermediates=True)
    assert features.shape == (2, LENGTH, 16)
    logits, again = model(ids, return_logits_and_embeddings=True)
    close(again, features)
    close(model.to_logits(features), logits)
    if frame == "memory":
        assert record.memory_tokens.shape == (2, 2, 16)


def test_wrong_sizes_are_named() -> None:
    model = framed("memory")
    ids = tokens(2, 6)
    with pytest.raises(ShapeError, match=r"`mask` has shape \(2, 5\); it must be \(2, 6\)"):
        model(ids, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"`prepend_embeds` has shape \(2, 3, 7\)"):
        model(ids, prepend_embeds=torch.randn(2, 3, 7))
    with pytest.raises(ShapeError, match="prepend_mask"):
        model(ids, prepend_embeds=torch.randn(2, 3, 16), prepend_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="attn_mask"):
        model(ids, attn_mask=torch.ones(5, 5, dtype=torch.bool))
