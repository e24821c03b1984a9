"""Cached steps as scripts of this family write them: new tokens without a flag, masks of new tokens, edited keys.

The numbers are those of one pass: the goldens, which the reference computed, or an uncached pass over the same tokens.
In a stack of one block, keys and values of a token depend on that token only, so that a cache that was cut equals a
pass in which the missing tokens are hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from catalog import close, perturbed
from test_goldens import golden
from torch import Tensor

from x_transformers import (
    Attention,
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
)
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.autoregressive_wrapper import modify_cached_kv
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates

STACK: dict[str, Any] = {"dim": 16, "heads": 2, "attn_dim_head": 8, "verbose": False}
RECORD = {"return_intermediates": True}
NEW = {"input_not_include_cache": True}
RIGHT = 1e-5

POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "rotary": {"rotary_pos_emb": True},
    "partial rotary": {"rotary_pos_emb": True, "rotary_emb_dim": 4, "rotary_interpolation_factor": 2.0},
    "some heads": {"rotary_pos_emb": True, "rotate_num_heads": 1},
    "xpos": {"rotary_xpos": True, "rotary_emb_dim": 8, "rotary_xpos_scale_base": 64},
    "polar": {"polar_pos_emb": True},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True},
    "grouped": {"rotary_pos_emb": True, "heads": 4, "attn_kv_heads": 2},
    "latent": {"rotary_pos_emb": True, "attn_use_latent_kv": True, "attn_dim_latent_kv": 6},
    "latent with key heads": {
        "rotary_pos_emb": True,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 6,
        "attn_latent_rope_subheads": 1,
    },
    "latent with a shared key": {
        "rotary_pos_emb": True,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 6,
        "attn_latent_rope_dim": 4,
    },
    "window": {"rotary_pos_emb": True, "attn_max_attend_past": 4},
    "learned keys": {"rotary_pos_emb": True, "attn_num_mem_kv": 2},
    "forgetting": {"attn_data_dependent_alibi": True},
}
EACH = pytest.mark.parametrize("name", POSITIONS)


def each_but(*left_out: str) -> Any:
    """All of them but those in which the cached tokens depend on more than their keys and values."""
    return pytest.mark.parametrize("name", [name for name in POSITIONS if name not in left_out])


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def decoder(name: str = "rotary", depth: int = 2, **more: Any) -> Decoder:
    return perturbed(Decoder(**{**STACK, "depth": depth, **POSITIONS[name], **more}))


def model_of(stack: Decoder, **more: Any) -> TransformerWrapper:
    return perturbed(TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=stack, **more))


def tokens(n: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 20, (batch, n))


# which tokens run


def continuous() -> tuple[Any, Tensor, str]:
    net = ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=32, attn_layers=decoder())
    return perturbed(net), torch.randn(2, 9, 6), "return_intermediates"


MODELS: dict[str, Callable[[], tuple[Any, Tensor, str]]] = {
    "stack": lambda: (decoder(), torch.randn(2, 9, 16), "return_hiddens"),
    "tokens": lambda: (model_of(decoder("alibi")), tokens(9), "return_intermediates"),
    "tokens with memory": lambda: (model_of(decoder(), num_memory_tokens=2), tokens(9), "return_intermediates"),
    "vectors": continuous,
}


@pytest.mark.parametrize("kind", MODELS)
def test_new_tokens_without_a_flag(kind: str) -> None:
    """Where x is no longer than the cache, its last token is new, or as many as `cache_age` says."""
    model, x, record = MODELS[kind]()
    wanted = model(x)
    _, cache = model(x[:, :5], **{record: True})
    close(model(x[:, 5:6], cache=cache), wanted[:, 5:6], RIGHT)
    close(model(x[:, 3:6], cache=cache), wanted[:, 5:6], RIGHT)
    close(model(x[:, 5:8], cache=cache, cache_age=3), wanted[:, 5:8], RIGHT)
    for at in range(5, 9):
        out, cache = model(x[:, at : at + 1], cache=cache, **{record: True})
        close(out, wanted[:, at : at + 1], RIGHT)


@pytest.mark.parametrize("kind", MODELS)
def test_all_tokens_that_are_not_cached_run(kind: str) -> None:
    """Where x is longer than the cache: the reference would drop all but the last; `cache_age` limits them."""
    model, x, record = MODELS[kind]()
    wanted = model(x)
    _, cache = model(x[:, :4], **{record: True})
    close(model(x, cache=cache), wanted[:, 4:], RIGHT)
    close(model(x, cache=cache, cache_age=5), wanted[:, 4:], RIGHT)
    assert model(x, cache=cache, cache_age=1).shape[1] == 1
    for given, age in ((x, 6), (x, 0), (x[:, :3], 4), (x[:, :0], None)):
        with pytest.raises(InputError, match="tokens are to run"):
            model(given, cache=cache, cache_age=age)


@pytest.mark.parametrize("kind", MODELS)
def test_positions_of_new_tokens_without_a_flag(kind: str) -> None:
    """`pos` covers the tokens given, those that run, or all so far."""
    model, x, record = MODELS[kind]()
    pos = torch.arange(9) * 2
    wanted = model(x, pos=pos)
    _, cache = model(x[:, :5], pos=pos[:5], **{record: True})
    for first in (5, 4, 2):
        close(model(x[:, first:6], pos=pos[first:6], cache=cache), wanted[:, 5:6], RIGHT)
        close(model(x[:, first:6], pos=pos[5:6], cache=cache), wanted[:, 5:6], RIGHT)
        close(model(x[:, first:6], pos=pos[None, :6], cache=cache), wanted[:, 5:6], RIGHT)
    close(model(x[:, 5:8], pos=pos[5:8].expand(2, -1), cache=cache, cache_age=3), wanted[:, 5:8], RIGHT)


def test_masks_over_the_tokens_given() -> None:
    model, x, mask = decoder(), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 5] = False
    wanted = model(x, self_attn_kv_mask=mask)[:, 5:]
    _, cache = model(x[:, :5], return_hiddens=True)
    close(model(x[:, 3:], self_attn_kv_mask=mask[:, 3:], cache=cache), wanted, RIGHT)
    close(model(x[:, 3:], self_attn_kv_mask=mask, cache=cache), wanted, RIGHT)


GOLDENS = """
    decoder-rotary decoder-rotary-interpolation decoder-xpos decoder-polar decoder-rotate-num-heads decoder-kv-heads
    decoder-one-kv-head decoder-mla decoder-mla-rope decoder-alibi decoder-rel-pos-bias decoder-window decoder-mem-kv
    decoder-memory-tokens decoder-forgetting decoder-sinusoidal decoder-qk-norm decoder-value-residual
"""


@pytest.mark.parametrize("name", GOLDENS.split())
def test_numbers_of_the_reference(name: str) -> None:
    """New tokens without a flag, what is read written back, and the cache made by hand of what is read."""
    one = golden(name)
    model: Any = one.build()
    model.load_state_dict(one.state)
    x, wanted = one.inputs["x"], one.output
    _, cache = model(x[:, :8], **RECORD)
    close(model(x[:, 8:], cache=cache, cache_age=4), wanted[:, 8:])
    for record in cache.attn_intermediates:
        record.cached_kv = tuple(record.cached_kv)
    out, cache = model(x[:, 8:9], cache=cache, **RECORD)
    close(out, wanted[:, 8:9])
    made = [Intermediates(cached_kv=record.cached_kv, layer_type="a") for record in cache.attn_intermediates]
    if name in ("decoder-memory-tokens", "decoder-forgetting", "decoder-value-residual"):
        return  # what these keep besides keys and values is refused below
    by_hand = LayerIntermediates(attn_intermediates=made, cache_length=9)
    out, cache = model(x[:, 9:10], cache=by_hand, **RECORD)
    close(out, wanted[:, 9:10])
    close(model(x[:, 10:], cache=cache, cache_age=2), wanted[:, 10:])


# masks of new tokens, padding


@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2}, {"memory_tokens_interspersed_every": 2}], ids=str)
def test_masks_of_the_new_tokens(options: dict[str, Any]) -> None:
    """By themselves, they go on from the masks of the passes before; with another mask over everything, from that."""
    if "memory_tokens_interspersed_every" in options:
        options = {**options, "num_memory_tokens": 2}
    model, x = model_of(decoder(), **options), tokens(9)
    mask = torch.tensor([[True] * 9, [True, True, True, False, False, True, True, False, True]])
    wanted = model(x, mask=mask)
    _, cache = model(x[:, :5], mask=mask[:, :5], **RECORD)
    for given in ({}, {"self_attn_kv_mask": mask}):
        seen = {name: t[:, :7] for name, t in given.items()}
        out, more = model(x[:, 5:7], mask=mask[:, 5:7], cache=cache, **seen, **NEW, **RECORD)
        last, more = model(
            x[:, 7:8], mask=mask[:, 7:8], cache=more, **{k: t[:, :8] for k, t in given.items()}, **NEW, **RECORD
        )
        end = model(x[:, 8:], mask=mask[:, 8:], cache=more, **given, **NEW)
        close(torch.cat((out, last, end), dim=1), wanted[:, 5:], RIGHT)


def test_rows_of_a_cache_and_of_new_tokens_must_agree() -> None:
    """Also those of states, such as shifted tokens; but a context of one row serves all rows."""
    cases: list[dict[str, Any]] = [{}, {"shift_tokens": 1}]
    for options in cases:
        model, x = model_of(decoder(**options)), tokens(9, 3)
        _, cache = model(x[:1, :5], **RECORD)
        with pytest.raises(ShapeError, match="rows"):
            model(x, cache=cache)
        for each in cache.attn_intermediates or ():
            each.cached_kv = tuple(t.expand(3, -1, -1, -1) for t in each.cached_kv or ())
        if options:
            with pytest.raises(ShapeError, match="rows of `token_shift`"):
                model(x, cache=cache)
    x, context = tokens(9, 3), torch.randn(1, 4, 16)
    crossing_first = Decoder(dim=16, heads=2, custom_layers=("c", "a", "f"), cross_attend=True, rotary_pos_emb=True)
    for stack in (decoder(cross_attend=True), perturbed(crossing_first)):
        model = model_of(stack)
        _, cache = model(x[:, :5], context=context, **RECORD)
        close(model(x, context=context, cache=cache), model(x, context=context)[:, 5:], RIGHT)


def test_a_mask_over_everything_decides_about_the_past() -> None:
    """A mask of the new tokens says nothing about cached ones if the other mask does."""
    model, x = model_of(decoder(depth=1)), tokens(6)
    hidden = torch.tensor([[True, False, True, True, True]]).expand(2, -1)
    everything = torch.ones(2, 6, dtype=torch.bool)
    wanted = model(x)[:, 5:]
    _, cache = model(x[:, :5], mask=hidden, **RECORD)
    ones = everything[:, 5:]
    close(model(x[:, 5:], mask=ones, self_attn_kv_mask=everything, cache=cache, **NEW), wanted, RIGHT)
    assert not torch.allclose(model(x[:, 5:], mask=ones, cache=cache, **NEW), wanted, atol=1e-4)


def test_masks_of_other_widths_are_refused() -> None:
    model, x = decoder(), torch.randn(2, 6, 16)
    _, cache = model(x[:, :4], return_hiddens=True)
    for width in (1, 3, 5, 7):
        with pytest.raises(ShapeError, match=rf"`mask` has shape \(2, {width}\)"):
            model(x[:, 4:], mask=torch.ones(2, width, dtype=torch.bool), cache=cache, **NEW)


@each_but("forgetting")  # what gates of padding tokens add up stays in the cache
def test_left_padding_given_only_at_a_cached_step(name: str) -> None:
    """In one block, as if it had been given from the first token on; and it may be given or left out again."""
    stack, x, start = decoder(name, depth=1), torch.randn(2, 8, 16), torch.tensor([0, 3])
    wanted, plain = stack(x, seq_start_pos=start), stack(x)
    _, cache = stack(x[:, :5], return_hiddens=True)
    out, cache = stack(x[:, 5:6], seq_start_pos=start, cache=cache, return_hiddens=True)
    close(out, wanted[:, 5:6], RIGHT)
    out, cache = stack(x[:, 6:7], seq_start_pos=start.clone(), cache=cache, return_hiddens=True)
    close(out, wanted[:, 6:7], RIGHT)
    close(stack(x[:, 7:], cache=cache), plain[:, 7:], RIGHT)
    other = torch.tensor([2, 1])
    close(stack(x[:, 7:], seq_start_pos=other, cache=cache), stack(x, seq_start_pos=other)[:, 7:], RIGHT)


@pytest.mark.parametrize("options", [{"num_memory_tokens": 2}, {"use_abs_pos_emb": False}], ids=str)
def test_left_padding_of_a_model_given_only_at_a_cached_step(options: dict[str, Any]) -> None:
    model, x, start = model_of(decoder(depth=1), **options), tokens(7), torch.tensor([0, 3])
    wanted = model(x, seq_start_pos=start)
    _, cache = model(x[:, :5], **RECORD)
    close(model(x[:, 5:], seq_start_pos=start, cache=cache, **NEW), wanted[:, 5:], RIGHT)
    static = model.static_cache(2, 9)
    _, cache = model(x[:, :5], cache=static, **NEW, **RECORD)
    close(model(x[:, 5:], seq_start_pos=start, cache=cache, **NEW), wanted[:, 5:], RIGHT)


def test_interspersed_memory_needs_the_padding_from_the_first_pass_on() -> None:
    model, x = model_of(decoder(), num_memory_tokens=2, memory_tokens_interspersed_every=2), tokens(7)
    _, cache = model(x[:, :5], **RECORD)
    with pytest.raises(InputError, match="from the first pass on"):
        model(x[:, 5:], seq_start_pos=torch.tensor([0, 3]), cache=cache, **NEW)


# keys and values


def keys_of(stack: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys before rotation, and the values, of one pass."""
    _, record = stack(x, return_hiddens=True)
    return [each.own_kv for each in record.attn_intermediates]


@EACH
def test_keys_are_shown_before_rotation(name: str) -> None:
    stack, x = decoder(name), torch.randn(2, 6, 16)
    _, cache = stack(x[:, :4], return_hiddens=True)
    _, cache = stack(x[:, 4:5], cache=cache, return_hiddens=True)
    _, cache = stack(x[:, 5:], cache=cache, return_hiddens=True)
    for record, (k, v) in zip(cache.attn_intermediates, keys_of(stack, x), strict=True):
        one, other = record.cached_kv
        if name.startswith("latent"):
            assert one.shape == (2, 6, 6)
            assert other is None or other.shape == (2, 1, 6, 4 if "shared" in name else 8)
        else:
            held = one.shape[-2]
            assert held == 6 if name != "window" else held >= 4
            close(one, k[..., -held:, :], RIGHT)
            close(other, v[..., -held:, :], RIGHT)


@EACH
@pytest.mark.parametrize("count", [3, 1])
def test_keys_cut_to_the_last(name: str, count: int) -> None:
    """They keep their distances, whatever the number of layers that are cut."""
    stack, x = decoder(name, depth=1), torch.randn(2, 9, 16)
    _, cache = stack(x[:, :6], return_hiddens=True)
    for record in cache.attn_intermediates:
        record.cached_kv = tuple(None if t is None else t[..., -count:, :] for t in record.cached_kv)
    assert cache.cache_length == 6
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[:, : 6 - count] = False
    seen[:6] = True
    wanted = stack(x, attn_mask=seen)[:, 6:]
    close(stack(x[:, 6:], cache=cache, cache_age=3), wanted, RIGHT)
    out, cache = stack(x[:, 6:7], cache=cache, return_hiddens=True)
    close(out, wanted[:, :1], RIGHT)
    mask = torch.ones(2, count + 3, dtype=torch.bool)
    if name not in ("window",):
        close(stack(x[:, 7:], mask=mask, cache=cache, **NEW), wanted[:, 1:], RIGHT)
    close(stack(x[:, 7:], mask=torch.ones(2, 9, dtype=torch.bool), cache=cache, **NEW), wanted[:, 1:], RIGHT)
    close(stack(x[:, 7:], mask=torch.ones(2, 2, dtype=torch.bool), cache=cache, **NEW), wanted[:, 1:], RIGHT)


@pytest.mark.parametrize("name", ["rotary", "alibi", "grouped", "learned keys"])
def test_layers_that_are_cut_differently(name: str) -> None:
    """The second of two attentions keeps two keys, as if it had a window of two when the next token comes."""
    stack, x = decoder(name), torch.randn(2, 8, 16)
    windowed = Decoder(**{**STACK, "depth": 2, **POSITIONS[name], "attn_max_attend_past": (99, 2)}).eval()
    windowed.load_state_dict(stack.state_dict())
    _, cache = stack(x[:, :6], return_hiddens=True)
    keys, values = cache.attn_intermediates[1].cached_kv
    cache.attn_intermediates[1].cached_kv = keys[..., -2:, :], values[..., -2:, :]
    out, cache = stack(x[:, 6:7], cache=cache, return_hiddens=True)
    close(out, windowed(x)[:, 6:7], RIGHT)
    assert [record.cached_kv[0].shape[-2] for record in cache.attn_intermediates] == [7, 3]
    keys, values = cache.attn_intermediates[1].cached_kv
    cache.attn_intermediates[1].cached_kv = keys[..., -2:, :], values[..., -2:, :]
    close(stack(x[:, 7:], cache=cache), windowed(x)[:, 7:], RIGHT)


@each_but("forgetting")  # further streams of each row: `KVCache.reorder`
def test_edited_keys_are_used(name: str) -> None:
    """Keys of two rows exchanged, as for the other row; the record that was copied stays as it was."""
    stack, x = decoder(name), torch.randn(2, 7, 16)
    _, cache = stack(x[:, :5], return_hiddens=True)
    swapped = copy.copy(cache)
    for record in swapped.attn_intermediates:
        record.cached_kv = tuple(None if t is None else t.flip(0) for t in record.cached_kv)
    wanted = stack(torch.cat((x[:, :5].flip(0), x[:, 5:]), dim=1))[:, 5:]
    close(stack(x[:, 5:], cache=swapped, cache_age=2), wanted, RIGHT)
    close(stack(x[:, 5:], cache=cache, cache_age=2), stack(x)[:, 5:], RIGHT)


@each_but("forgetting", "window")  # gates of the tokens cannot be moved; a window has dropped keys
def test_prompts_of_different_lengths_moved_to_the_right(name: str) -> None:
    """Read with padding on the right, moved so that all end at the same place, and continued with left padding."""
    stack, x, lengths = decoder(name), torch.randn(2, 7, 16), torch.tensor([5, 3])
    _, cache = stack(x[:, :5], return_hiddens=True)
    start = 5 - lengths
    for record in cache.attn_intermediates:
        moved = [
            None if t is None else torch.stack([row.roll(int(by), dims=-2) for row, by in zip(t, start, strict=True)])
            for t in record.cached_kv
        ]
        record.cached_kv = tuple(moved)
    out, cache = stack(x[:, 5:6], cache=cache, seq_start_pos=start, return_hiddens=True)
    last = stack(x[:, 6:], cache=cache, seq_start_pos=start)
    for row, length in enumerate(lengths.tolist()):
        alone = stack(torch.cat((x[row : row + 1, :length], x[row : row + 1, 5:]), dim=1))
        close(torch.cat((out, last), dim=1)[row], alone[0, length:], RIGHT)


@EACH
def test_a_cache_made_by_hand(name: str) -> None:
    stack, x = decoder(name), torch.randn(2, 8, 16)
    _, cache = stack(x[:, :6], return_hiddens=True)
    made = LayerIntermediates(
        attn_intermediates=[Intermediates(cached_kv=r.cached_kv) for r in cache.attn_intermediates]
    )
    if name == "forgetting":
        with pytest.raises(InputError, match="made by hand has no forget"):
            stack(x[:, 6:7], cache=made)
        return
    made.cache_length = 6
    assert made.cache_length == 6
    out, after = stack(x[:, 6:7], cache=made, return_hiddens=True)
    wanted = stack(x)[:, 6:]
    close(out, wanted[:, :1], RIGHT)
    assert after.cache_length == 7
    close(stack(x[:, 7:], cache=after), wanted[:, 1:], RIGHT)
    for replaced in (replace(cache, attn_intermediates=made.attn_intermediates), copy.copy(cache)):
        replaced.attn_intermediates = list(made.attn_intermediates or ())
        close(stack(x[:, 6:], cache=replaced, cache_age=2), wanted, RIGHT)


def test_a_cache_made_by_hand_must_fit() -> None:
    stack, x = decoder(), torch.randn(2, 6, 16)
    k, v = keys_of(stack, x)[0]
    pair = Intermediates(cached_kv=(k, v))
    for records, match in (
        ([pair], "each of the 2 attentions"),
        ([Intermediates()] * 2, "hold none"),
        ([], "hold none"),
    ):
        with pytest.raises(InputError, match=match):
            stack(x[:, :1], cache=LayerIntermediates(attn_intermediates=records))
    with pytest.raises(ShapeError, match="`cached_kv` has shapes"):
        stack(x[:, :1], cache=LayerIntermediates(attn_intermediates=[pair, Intermediates(cached_kv=(k,))]))
    made, encoder = LayerIntermediates(attn_intermediates=[pair, pair]), Encoder(**STACK, depth=2)
    with pytest.raises(InputError, match="only a causal stack"):
        encoder(x[:, :1], cache=made)
    shifted = decoder(shift_tokens=1)
    with pytest.raises(InputError, match="has no states"):
        shifted(x[:, :1], cache=LayerIntermediates(attn_intermediates=[pair, pair]))
    with pytest.raises(InputError, match="none of memory tokens"):
        model_of(stack, num_memory_tokens=1)(tokens(1), cache=LayerIntermediates(attn_intermediates=[pair, pair]))
    _, cache = stack(x, return_hiddens=True)
    for value in ((k,), (k[:, :1], v[:, :1]), (k, v[..., :2, :]), (k, v[..., :4])):
        with pytest.raises(ShapeError, match="`cached_kv` has shapes"):
            cache.attn_intermediates[0].cached_kv = value
    cache.attn_intermediates[0].cached_kv = k[:1], v[:1]
    with pytest.raises(ShapeError, match="the edited cache has 1 rows"):
        stack(x[:, :1], cache=cache)


@each_but("forgetting", "window")  # a window has dropped keys, and running sums cannot be taken back
def test_the_length_of_a_cache_may_be_set(name: str) -> None:
    """The last two tokens are taken back: keys and length, in either order."""
    stack, x = decoder(name), torch.randn(2, 8, 16)
    wanted = stack(x)
    for keys_first in (True, False):
        _, cache = stack(torch.cat((x[:, :5], torch.randn(2, 2, 16)), dim=1), return_hiddens=True)
        if not keys_first:
            cache.cache_length = 5
        for record in cache.attn_intermediates:
            record.cached_kv = tuple(None if t is None else t[..., :5, :] for t in record.cached_kv)
        if keys_first:
            cache.cache_length = cache.cache_length - 2
        assert cache.cache_length == 5
        close(stack(x[:, 5:], cache=cache, cache_age=3), wanted[:, 5:], RIGHT)


def test_a_model_counts_from_the_length_that_was_set() -> None:
    """Keys of other tokens in front: absolute positions go on as the length says, and masks cover all keys."""
    model, x = model_of(decoder("none")), tokens(6)
    _, cache = model(x[:, :4], **RECORD)
    wanted = model(x[:, 4:], cache=cache, **NEW)
    front = torch.randn(2, 2, 2, 8), torch.zeros(2, 2, 2, 8)
    for record in cache.attn_intermediates:
        record.cached_kv = tuple(torch.cat(pair, dim=-2) for pair in zip(front, record.cached_kv, strict=True))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, :2] = False
    close(model(x[:, 4:], cache=cache, self_attn_kv_mask=mask, **NEW), wanted, RIGHT)
    assert not torch.allclose(model(x[:, 4:], cache=cache, **NEW), wanted, atol=1e-4)
    cache.cache_length = 3
    shifted = model(torch.cat((x[:, :3], x[:, 4:]), dim=1), cache=cache, self_attn_kv_mask=mask)
    _, fresh = model(x[:, :4], **RECORD)
    close(shifted, model(x[:, 4:], pos=torch.tensor([3, 4]), cache=fresh, **NEW), RIGHT)


def test_lengths_that_cannot_be_set() -> None:
    model, x = model_of(decoder()), tokens(6)
    _, cache = model(x[:, :4], pos=torch.arange(4) * 2, **RECORD)
    with pytest.raises(InputError, match="positions of the cached tokens were given"):
        cache.cache_length = 3
    _, cache = model(x[:, :4], cache=model.static_cache(2, 8), **NEW, **RECORD)
    with pytest.raises(InputError, match="static cache counts"):
        cache.cache_length = 3
    _, cache = model(x[:, :4], **RECORD)
    with pytest.raises(InputError, match="`cache_length` is -1"):
        cache.cache_length = -1


@pytest.mark.parametrize("name", ["rotary", "polar", "window"])
def test_static_caches_show_and_take_keys(name: str) -> None:
    stack, x = decoder(name), torch.randn(2, 12, 16)
    _, cache = stack(x[:, :9], cache=stack.static_cache(2, 32), return_hiddens=True, **NEW)
    _, cache = stack(x[:, 9:10], cache=cache, return_hiddens=True, **NEW)
    for record, (k, v) in zip(cache.attn_intermediates, keys_of(stack, x[:, :10]), strict=True):
        keys, values = record.cached_kv
        held = keys.shape[-2]
        assert held == (8 if name == "window" else 10)
        close(keys, k[..., -held:, :], RIGHT)
        close(values, v[..., -held:, :], RIGHT)
        record.cached_kv = keys, values
        with pytest.raises(InputError, match="not another number"):
            record.cached_kv = keys[..., :2, :], values[..., :2, :]
    close(stack(x[:, 10:], cache=cache, **NEW), stack(x)[:, 10:], RIGHT)


def test_keys_of_a_context() -> None:
    """Keys and values of cross-attention, also where positions of the context rotate them."""
    stack = decoder(cross_attend=True)
    x, context, pos = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.arange(5) * 3
    for given in ({}, {"context_pos": pos}):
        wanted = stack(x, context=context, **given)
        _, plain = stack(x[:, :4], context=context, return_hiddens=True)
        _, cache = stack(x[:, :4], context=context, return_hiddens=True, **given)
        mine, theirs = (record.attn_intermediates[1] for record in (cache, plain))
        assert mine.layer_type == "c"
        close(mine.cached_kv[0], theirs.cached_kv[0], RIGHT)
        for record in cache.attn_intermediates:
            record.cached_kv = record.cached_kv
        close(stack(x[:, 4:], cache=cache, cache_age=2), wanted[:, 4:], RIGHT)
    made = LayerIntermediates(
        attn_intermediates=[Intermediates(cached_kv=r.cached_kv) for r in plain.attn_intermediates]
    )
    close(stack(x[:, 4:], cache=made, cache_age=2), stack(x, context=context)[:, 4:], RIGHT)


def test_keys_of_a_model_with_leading_slots() -> None:
    """Memory tokens and prepended embeddings are the first keys; what is left of a cut cache are the last tokens."""
    model, x = model_of(decoder(depth=1), num_memory_tokens=2), tokens(9)
    embeds = torch.randn(2, 3, 16)
    _, cache = model(x[:, :6], prepend_embeds=embeds, **RECORD)
    assert cache.attn_intermediates[0].cached_kv[0].shape[-2] == 11
    whole = copy.copy(cache)
    modify_cached_kv(whole, lambda t: t)
    close(model(x[:, 6:], cache=whole, **NEW), model(x, prepend_embeds=embeds)[:, 9:], RIGHT)
    modify_cached_kv(cache, lambda t: t[..., -4:, :])
    out, after = model(x[:, 6:7], cache=cache, **NEW, **RECORD)
    alone = model_of(decoder(depth=1))
    alone.load_state_dict({name: t for name, t in model.state_dict().items() if name != "memory_tokens"})
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[:, :2] = False
    wanted = alone(x, attn_mask=seen)[:, 6:]
    close(torch.cat((out, model(x[:, 7:], cache=after, **NEW)), dim=1), wanted, RIGHT)


def test_recurrent_memory_is_not_cached() -> None:
    model, x = model_of(decoder(), max_mem_len=4), tokens(9)
    _, mems = model(x[:, :4], return_mems=True)
    wanted = model(x[:, 4:], mems=mems)
    _, cache = model(x[:, 4:7], mems=mems, **RECORD)
    for record in cache.attn_intermediates:
        assert record.cached_kv[0].shape[-2] == 3
        record.cached_kv = record.cached_kv
    close(model(x[:, 7:], mems=mems, cache=cache, **NEW), wanted[:, 3:], RIGHT)


def test_tables_of_a_caller() -> None:
    """Keys that a caller's own rotary tables rotated, in a cache from a pass and in one made by hand."""
    stack, x = decoder("none"), torch.randn(2, 8, 16)
    rotary = RotaryEmbedding(4)

    def table(n: int) -> dict[str, Any]:
        return {"rotary_pos_emb": rotary.forward_from_seq_len(n)}

    wanted, plain = stack(x, **table(8))[:, 6:], keys_of(stack, x[:, :6])
    _, cache = stack(x[:, :6], return_hiddens=True, **table(6))
    close(cache.attn_intermediates[0].cached_kv[0], plain[0][0], RIGHT)
    made = LayerIntermediates(
        attn_intermediates=[Intermediates(cached_kv=r.cached_kv) for r in cache.attn_intermediates]
    )
    for record in cache.attn_intermediates:
        record.cached_kv = record.cached_kv
    close(stack(x[:, 6:], cache=cache, cache_age=2, **table(8)), wanted, RIGHT)
    close(stack(x[:, 6:], cache=made, cache_age=2, **table(8)), wanted, RIGHT)


def test_attention_by_itself() -> None:
    attention, x = perturbed(Attention(16, heads=2, dim_head=8, causal=True)), torch.randn(2, 6, 16)
    rotary = RotaryEmbedding(8)
    tables = [rotary.forward_from_seq_len(n) for n in range(7)]
    wanted = attention(x, rotary_pos_emb=tables[6])
    _, record = attention(x[:, :4], rotary_pos_emb=tables[4], return_intermediates=True)
    k, v = record.cached_kv
    close(k, attention.to_k(x[:, :4]).unflatten(-1, (2, 8)).transpose(1, 2), RIGHT)
    record.cached_kv = k, v
    for cache in (record, Intermediates(cached_kv=(k, v))):
        out, after = attention(x[:, 4:5], rotary_pos_emb=tables[5], cache=cache, return_intermediates=True)
        last = attention(x[:, 5:], rotary_pos_emb=tables[6], cache=after)
        close(torch.cat((out, last), dim=1), wanted[:, 4:], RIGHT)


def test_copies_do_not_share_edits() -> None:
    stack, x = decoder(), torch.randn(2, 6, 16)
    _, cache = stack(x[:, :5], return_hiddens=True)
    one = copy.copy(cache.attn_intermediates[0])
    one.cached_kv = tuple(t * 0 for t in one.cached_kv)
    close(stack(x[:, 5:], cache=cache), stack(x)[:, 5:], RIGHT)
    changed = copy.copy(cache)
    changed.attn_intermediates[0] = one
    assert not torch.allclose(stack(x[:, 5:], cache=changed), stack(x)[:, 5:], atol=1e-4)


def test_caches_that_were_edited_can_be_cut_reordered_and_rolled_back() -> None:
    stack, x = decoder(), torch.randn(2, 9, 16)
    _, cache = stack(x[:, :6], return_hiddens=True)
    modify_cached_kv(cache, lambda t: t[..., -4:, :])
    _, cache = stack(x[:, 6:8], cache=cache, cache_age=2, return_hiddens=True)
    wanted = stack(x[:, 8:], cache=cache)
    twin = copy.copy(cache)
    assert twin.cache is not None
    twin.cache.reorder(torch.tensor([1, 0]))
    close(stack(x[:, 8:].flip(0), cache=twin), wanted.flip(0), RIGHT)
    close(twin.attn_intermediates[0].cached_kv[0].flip(0), cache.attn_intermediates[0].cached_kv[0], RIGHT)
    _, more = stack(torch.randn(2, 1, 16), cache=cache, return_hiddens=True)
    assert more.cache.can_roll_back(1)
    more.cache.rollback(1)
    close(stack(x[:, 8:], cache=more), wanted, RIGHT)
    shorter = copy.copy(cache)
    modify_cached_kv(shorter, lambda t: t[..., -3:, :])
    cache.cache.crop(3)
    close(stack(x[:, 8:], cache=cache), stack(x[:, 8:], cache=shorter), RIGHT)


def test_generation_goes_on_from_edited_caches_and_those_made_by_hand() -> None:
    model, prompt = model_of(decoder()), tokens(6)
    wrapper = AutoregressiveWrapper(model)
    wanted = wrapper.generate(prompt, 4, temperature=0.0)
    _, cache = model(prompt[:, :5], **RECORD)
    for record in cache.attn_intermediates:
        record.cached_kv = record.cached_kv
    made = [Intermediates(cached_kv=record.cached_kv) for record in cache.attn_intermediates]
    for given in (cache, LayerIntermediates(attn_intermediates=made, cache_length=5), copy.deepcopy(cache)):
        assert torch.equal(wrapper.generate(prompt, 4, temperature=0.0, cache=given), wanted)
