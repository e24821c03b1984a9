"""Positions: a caller's `pos` changes what encodings read, never who sees whom."""

from typing import Any

import pytest
import torch
from catalog import BASE, CASES, Case, call, close, decode, name_of, one_of_each, static_cache, tokens
from promises import CHUNKS, LENGTH, keeps_the_past
from torch import Tensor

from x_transformers import Decoder
from x_transformers.x_transformers import RotaryEmbedding

EVERY = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "encoder", exempt="positions"), ids=name_of)
POSITIONAL = ("plain", "rotary-1", "rotary-4", "alibi-1", "t5_bias-1", "dynamic_bias-1", "absolute_positions-2")
READS = pytest.mark.parametrize("case", [c for c in CASES if c.name in POSITIONAL], ids=name_of)


@EVERY
@torch.no_grad()
def test_default_positions_change_nothing(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH)
    wanted = call(model, ids)
    for given in (pos, pos.int(), pos.expand(2, -1)):
        close(call(model, ids, pos=given), wanted)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="positions"), ids=name_of)
@torch.no_grad()
def test_packed_positions_do_not_open_the_future(stack: str, case: Case) -> None:
    model = case.build(stack)
    keeps_the_past(model, pos=torch.arange(LENGTH) % 3)
    keeps_the_past(model, pos=torch.arange(LENGTH).flip(0))


@READS
@torch.no_grad()
def test_positions_are_read(case: Case) -> None:
    model = case.build()
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH)
    assert not torch.allclose(call(model, ids, pos=2 * pos), call(model, ids), atol=1e-3)


@READS
@torch.no_grad()
def test_rows_have_their_own_positions(case: Case) -> None:
    model = case.build()
    ids, pos = tokens(3, LENGTH), torch.randint(0, 30, (3, LENGTH))
    together = call(model, ids, pos=pos)
    for row in range(3):
        close(together[row : row + 1], call(model, ids[row : row + 1], pos=pos[row]))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in POSITIONAL[1:-1]], ids=name_of)
@torch.no_grad()
def test_only_differences_matter(case: Case) -> None:
    """Relative encodings do not notice where a sequence begins."""
    model = case.build(use_abs_pos_emb=False)
    ids, pos = tokens(2, LENGTH), torch.randperm(LENGTH)
    close(call(model, ids, pos=pos + 11), call(model, ids, pos=pos))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in (*POSITIONAL, "memory_tokens-1")], ids=name_of)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_positions_of_new_tokens_or_of_all(case: Case, kind: str) -> None:
    """With a cache, `pos` covers the new tokens or all tokens so far; without it, positions continue as slots do."""
    model = case.build()
    ids, pos = tokens(2, LENGTH), torch.randint(0, 20, (2, LENGTH))
    wanted = call(model, ids, pos=pos)

    def cache() -> object:
        return static_cache(model, 2, LENGTH) if kind == "static" else None

    close(decode(model, ids, CHUNKS, cache=cache(), per_token={"pos": pos}), wanted)
    outputs, end, state = [], 0, cache()
    for chunk in CHUNKS:
        start, end = end, end + chunk
        out, state = call(
            model,
            ids[:, start:end],
            cache=state,
            pos=pos[:, start:end],
            input_not_include_cache=True,
            return_intermediates=True,
        )
        outputs.append(out)
    close(torch.cat(outputs, dim=1), wanted)

    half = torch.cat((pos[:, :4], torch.arange(4, LENGTH).expand(2, -1)), dim=1)
    _, state = call(
        model, ids[:, :4], cache=cache(), pos=pos[:, :4], input_not_include_cache=True, return_intermediates=True
    )
    rest = call(model, ids[:, 4:], cache=state, input_not_include_cache=True)
    close(rest, call(model, ids, pos=half)[:, 4:])


@torch.no_grad()
def test_floating_positions_are_embeddings() -> None:
    """They replace the table, and rotation does not read them."""
    ids = tokens(2, LENGTH)
    model = BASE.build(rotary_pos_emb=True)
    embeds = torch.randn(LENGTH, 16)
    close(model(ids, pos=embeds), model(ids, sum_embeds=embeds.expand(2, -1, -1)))
    model = BASE.build()
    table = model.pos_emb.emb.weight[:LENGTH] * model.pos_emb.scale
    close(model(ids, pos=table), model(ids))


@torch.no_grad()
def test_a_window_reads_slots() -> None:
    model = BASE.build(attn_max_attend_past=2, use_abs_pos_emb=False)
    ids = tokens(2, LENGTH)
    close(model(ids, pos=torch.arange(LENGTH) * 5), model(ids))


# Numbers of encodings, by their formulas


def logits(stack: Decoder, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with and without what is added to them, `(b, h, n, n)` each, where a query sees the key."""
    _, record = stack(x, pos=pos, return_hiddens=True)
    first = record.attn_intermediates[0]
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return first.pre_softmax_attn.masked_fill(~seen, 0.0), first.qk_similarities.masked_fill(~seen, 0.0)


def one_layer(**options: Any) -> Decoder:
    torch.default_generator.manual_seed(0)
    return Decoder(dim=16, depth=1, heads=4, attn_dim_head=8, only_attn=True, verbose=False, **options).eval()


@torch.no_grad()
def test_alibi_by_formula() -> None:
    """Minus the distance times `2 ** (-8 (h + 1) / heads)`."""
    x, pos = torch.randn(2, LENGTH, 16), torch.randperm(LENGTH)
    added, plain = logits(one_layer(alibi_pos_bias=True), x, pos)
    distance = (pos[:, None] - pos).abs().tril().float()
    slopes = 2.0 ** (-2.0 * torch.arange(1, 5))
    close(added - plain, (-distance * slopes[:, None, None]).expand(2, -1, -1, -1))


@pytest.mark.parametrize("width", [2, 4, 8])
@torch.no_grad()
def test_rotation_by_formula(width: int) -> None:
    """Pair k of the rotated features turns by `pos * 10000 ** (-2 k / width)`, so that scores depend on differences."""
    stack = one_layer(rotary_pos_emb=True, rotary_emb_dim=width)
    still = one_layer()
    still.load_state_dict(stack.state_dict())
    x, pos = torch.randn(1, LENGTH, 16), torch.randint(0, 50, (LENGTH,))
    normed = still.branches("a")[0].norm(x)
    attention = still.branches("a")[0].attention
    q, k = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (attention.to_q(normed), attention.to_k(normed)))
    angles = (pos[:, None] - pos)[..., None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    pairs = [torch.view_as_complex(t[..., :width].unflatten(-1, (-1, 2)).contiguous()) for t in (q, k)]
    turned = pairs[0][..., :, None, :] * pairs[1][..., None, :, :].conj() * torch.polar(torch.ones(()), angles.float())
    wanted = turned.real.sum(dim=-1) + q[..., width:] @ k[..., width:].mT
    close(logits(stack, x, pos)[1], (wanted * 8**-0.5).tril(), 1e-4)


@torch.no_grad()
def test_interpolation_by_formula() -> None:
    """Positions are divided by the factor."""
    x, pos = torch.randn(2, LENGTH, 16), torch.randperm(LENGTH)
    wanted = one_layer(rotary_pos_emb=True)(x, pos=pos)
    close(one_layer(rotary_pos_emb=True, rotary_interpolation_factor=3.0)(x, pos=3 * pos), wanted)
    angles = RotaryEmbedding(4, interpolation_factor=3.0)(3 * pos)[0]
    close(angles, RotaryEmbedding(4)(pos)[0])


@torch.no_grad()
def test_which_heads_rotate_by_formula() -> None:
    """The last ones: scores of the others do not depend on positions."""
    stack = one_layer(rotary_pos_emb=True, rotate_num_heads=1)
    x, pos = torch.randn(2, LENGTH, 16), torch.randperm(LENGTH)
    one, two = (logits(stack, x, each)[1] for each in (pos, pos.flip(0)))
    close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3], two[:, 3], atol=1e-2)
