"""xPos at any position and over any number of tokens: its factors cancel in scores, but alone they may be infinite."""

from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor

from x_transformers import Decoder
from x_transformers.errors import InputError

LENGTH, FAR, REACH = 16, 100_000, 48
STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "rotary_xpos": True, "verbose": False}
"""With a scale base of 1, one reference position serves 48 queries."""
NEW = {"return_hiddens": True, "input_not_include_cache": True}
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"attn_kv_heads": 2},
    "some heads": {"rotate_num_heads": 2},
    "all features": {"rotary_emb_dim": 8},
    "window": {"attn_max_attend_past": 20},
    "zero key": {"attn_add_zero_kv": True},
    "sink and soft clamp": {"attn_head_learned_sink": True, "attn_softclamp_logits": True},
    "a bias": {"alibi_pos_bias": True},
    "contextual positions": {"attn_use_cope": True},
    "latent": {
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 8,
        "attn_latent_rope_subheads": 1,
        "attn_kv_heads": 2,
    },
    "latent with a shared key": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8, "attn_latent_rope_dim": 4},
}
EVERY = pytest.mark.parametrize("name", SITUATIONS)


def stack_of(base: float = 1.0, **options: Any) -> Decoder:
    torch.default_generator.manual_seed(0)
    return Decoder(**{**STACK, "rotary_xpos_scale_base": base, **options}).eval()


def scores_by_formula(stack: Decoder, x: Tensor, pos: Tensor) -> Tensor:
    """Pair k of the first r features contributes `Re(q conj(k) exp(i d theta)) zeta ** (d / s)` at a distance d."""
    rotary, branch = stack.rotary_pos_emb, stack.branches("a")[0]
    normed, width = branch.norm(x), rotary.dim
    q, k = (t(normed).unflatten(-1, (4, 8)).transpose(1, 2) for t in (branch.attention.to_q, branch.attention.to_k))
    distance = (pos.unsqueeze(-1) - pos.unsqueeze(-2)).clamp(min=0).unsqueeze(-1)
    zeta = (torch.arange(0, width, 2) + 0.4 * width) / (1.4 * width)
    turn = torch.polar(zeta ** (distance / rotary.scale_base), distance * rotary.inv_freq)
    pairs = [torch.view_as_complex(t[..., :width].unflatten(-1, (-1, 2)).contiguous()) for t in (q, k)]
    turned = pairs[0][..., :, None, :] * pairs[1][..., None, :, :].conj() * turn
    scores = turned.real.sum(dim=-1) + q[..., width:] @ k[..., width:].mT
    fixed = 0 if rotary.num_heads is None else 4 - rotary.num_heads
    return (torch.cat(((q @ k.mT)[:, :fixed], scores[:, fixed:]), dim=1) * 8**-0.5).tril()


@pytest.mark.parametrize(("base", "length"), [(512, LENGTH), (16, LENGTH), (1, LENGTH), (1, 3 * REACH + 5), (0.01, 7)])
@pytest.mark.parametrize(("start", "options"), [(0, {}), (5000, {}), (5000, {"rotate_num_heads": 3})])
@torch.no_grad()
def test_scores_by_formula(base: float, length: int, start: int, options: dict[str, Any]) -> None:
    x, pos = torch.randn(1, length, 16), torch.arange(start, start + length)
    wanted = scores_by_formula(stack := stack_of(base, depth=1, **options), x, pos)
    _, record = stack(x, pos=pos, return_hiddens=True)
    close(record.attn_intermediates[0].qk_similarities.tril(), wanted, 2e-3)


@pytest.mark.parametrize(("name", "fixed"), [("some heads", 2), ("latent", 2)])
@torch.no_grad()
def test_heads_that_do_not_rotate_do_not_decay(name: str, fixed: int) -> None:
    stack, x = stack_of(depth=1, **SITUATIONS[name]), torch.randn(1, LENGTH, 16)
    here, there = (
        stack(x, pos=pos, return_hiddens=True)[1].attn_intermediates[0].qk_similarities.tril()
        for pos in (torch.arange(LENGTH), torch.zeros(LENGTH, dtype=torch.long))
    )
    close(here[:, :fixed], there[:, :fixed])
    assert all((here[:, head] - there[:, head]).abs().max() > 1e-2 for head in range(fixed, 4))


@torch.no_grad()
def test_no_tokens() -> None:
    stack = stack_of()
    assert stack(torch.randn(2, 0, 16)).shape == (2, 0, 16)
    assert stack(torch.randn(0, 3, 16)).shape == (0, 3, 16)


@EVERY
def test_no_position_is_too_far_and_no_pass_too_long(name: str) -> None:
    """Only distances count, whatever kernel runs, for outputs and gradients."""
    x = torch.randn(2, 2 * REACH + 9, 16)
    found = []
    for flash, start in ((None, 0), (None, FAR), (False, FAR)):
        stack, given = stack_of(attn_flash=flash, **SITUATIONS[name]), x.clone().requires_grad_()
        out = stack(given, pos=torch.arange(x.shape[1]) + start)
        out.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in stack.parameters())
        found.append((out.detach(), given.grad))
    for out, gradient in found[1:]:
        # angles of far positions are rounded
        close(out, found[0][0], 1e-3)
        close(gradient, found[0][1], 2e-2)


@EVERY
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_cached_is_uncached_anywhere(name: str, kind: str) -> None:
    """Each pass of a cache has a reference position of its own."""
    stack, length = stack_of(**SITUATIONS[name]), REACH + 30
    x, pos = torch.randn(2, length, 16), torch.stack((torch.arange(length), torch.arange(length) + FAR))
    wanted, state, outputs = stack(x, pos=pos), stack.static_cache(2, length) if kind == "static" else None, []
    for start, end in ((0, REACH + 10), (REACH + 10, REACH + 11), (REACH + 11, REACH + 28), (length - 2, length)):
        out, state = stack(x[:, start:end], pos=pos[:, start:end], cache=state, **NEW)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), wanted, 1e-4)


@torch.no_grad()
def test_padding_on_the_left() -> None:
    stack, x = stack_of(), torch.randn(2, 2 * REACH, 16)
    padded = stack(x, seq_start_pos=torch.tensor([0, 60]))
    close(padded[1:, 60:], stack(x[1:, 60:]), 1e-4)


@torch.no_grad()
def test_recurrent_memory() -> None:
    """Memory tokens have the positions before the first token."""
    stack, x, mems = stack_of(), torch.randn(1, REACH + 9, 16), [torch.randn(1, 3, 16) for _ in range(2)]
    whole, half = stack(x, mems=mems), stack(x[:, :REACH], mems=mems)
    close(half, whole[:, :REACH], 1e-4)


@torch.no_grad()
def test_additional_keys_have_position_0() -> None:
    stack, x = stack_of(16), torch.randn(1, 12, 16)
    extra = [(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)) for _ in range(2)]
    wanted = stack(x, self_attn_additional_kv=extra)
    _, state = stack(x[:, :7], self_attn_additional_kv=extra, return_hiddens=True)
    close(stack(x[:, 7:], self_attn_additional_kv=extra, cache=state, input_not_include_cache=True), wanted[:, 7:])
    assert stack(x, self_attn_additional_kv=extra, pos=torch.arange(12) + FAR).isfinite().all()


@torch.no_grad()
def test_positions_of_a_context() -> None:
    stack, x, context = stack_of(16, cross_attend=True), torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    at, pos = torch.arange(5), torch.arange(6)
    wanted = stack(x, context=context, context_pos=at)
    close(stack(x, context=context, context_pos=at + FAR, pos=pos + FAR), wanted, 1e-3)
    _, state = stack(x[:, :3], context=context, context_pos=at, return_hiddens=True)
    close(stack(x[:, 3:], context=context, cache=state, input_not_include_cache=True), wanted[:, 3:])


@torch.no_grad()
def test_gaps_between_positions() -> None:
    """However far apart they are, a token sees itself as it is, and nothing that is farther than the decay reaches."""
    stack = stack_of(depth=1)
    x, pos = torch.randn(1, 6, 16), torch.tensor([0, 1, 2, FAR, FAR + 1, 2 * FAR])
    _, record = stack(x, pos=pos, return_hiddens=True)
    seen, wanted = record.attn_intermediates[0].qk_similarities, scores_by_formula(stack, x, pos * 0)
    close(seen.diagonal(dim1=-2, dim2=-1), wanted.diagonal(dim1=-2, dim2=-1))
    apart = scores_by_formula(stack, x, pos)
    close(seen[..., 3:, :3], apart[..., 3:, :3])
    close(seen[..., 5:, :5], apart[..., 5:, :5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flash", [None, False])
def test_half_precision(dtype: torch.dtype, flash: bool | None) -> None:
    x, pos = torch.randn(2, REACH + 20, 16), torch.arange(REACH + 20) + FAR
    stack = stack_of(attn_flash=flash)
    with torch.no_grad():
        wanted = stack(x, pos=pos)
    stack, x = stack.to(dtype), x.to(dtype)
    out = stack(x, pos=pos)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters() if p.grad is not None)
    assert (out.float() - wanted).abs().max() < 0.1
    with torch.no_grad():
        _, state = stack(x[:, :REACH], pos=pos[:REACH], return_hiddens=True)
        for t in range(REACH, REACH + 3):
            step, state = stack(x[:, t : t + 1], pos=pos[t : t + 1], cache=state, **NEW)
            assert (step.float() - wanted[:, t : t + 1]).abs().max() < 0.1


@torch.no_grad()
def test_graphs_take_any_length() -> None:
    """A graph has a fixed number of reference positions, and serves all lengths that need as many."""
    torch.compiler.reset()
    stack, graphs = stack_of(depth=1), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stack, fullgraph=True, backend=backend)
    for length, number in ((20, 1), (REACH, 2), (60, 3), (2 * REACH, 3)):
        x = torch.randn(1, length, 16)
        close(compiled(x), stack(x))
        assert len(graphs) == number, length


def test_long_passes_are_explained() -> None:
    stack = stack_of()
    near, long = (str(stack.explain(device="cpu", seq_len=length)) for length in (REACH, REACH + 1))
    assert "sdpa cannot host xPos over a pass of this length" in long
    assert "cannot host xPos" not in near


def test_second_derivatives_of_long_passes() -> None:
    stack, x = stack_of(depth=1), torch.randn(1, REACH + 9, 16, requires_grad=True)
    found = []
    for flash in (None, False):
        stack.branches("a")[0].attention.attend.backends.flash = flash
        (gradient,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    close(found[0], found[1], 1e-3)


@torch.no_grad()
def test_tables_of_callers() -> None:
    """The table of positions that are far from 0 scores as that of positions from 0, or is refused."""
    own, x = stack_of(16), torch.randn(2, LENGTH, 16)
    rotary, bare = own.rotary_pos_emb, stack_of(16, rotary_xpos=False)
    bare.load_state_dict(own.state_dict(), strict=False)
    wanted = own(x)
    for start in (0, FAR):
        angles, factor = rotary(torch.arange(LENGTH), offset=start)
        assert factor.isfinite().all()
        close(bare(x, rotary_pos_emb=(angles, factor)), wanted, 1e-3)
    rows = torch.stack((torch.arange(LENGTH), torch.arange(LENGTH) + FAR))
    close(bare(x, rotary_pos_emb=rotary(rows)), wanted, 1e-3)
    assert rotary(torch.arange(0))[1].shape == (1, 0, rotary.dim)
    long = rotary(torch.arange(2000))
    with pytest.raises(InputError, match="xPos factors"):
        bare(torch.randn(1, 2000, 16), rotary_pos_emb=long)
    assert own(torch.randn(1, 2000, 16)).isfinite().all()
