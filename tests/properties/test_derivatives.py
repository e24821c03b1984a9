"""Derivatives of derivatives, and in forward mode: with default options they are those of the explicit backend."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, name_of, one_of_each, other_inputs, tokens
from combined import build
from torch import Tensor, nn

from x_transformers import AttentionLayers, Encoder, TransformerWrapper
from x_transformers.attention.attention import Attention
from x_transformers.attention.backends.blocked import Blocked
from x_transformers.attention.backends.explicit import Explicit

FIRSTS = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="derivatives"), ids=name_of)
LENGTH = 5


def attentions(model: nn.Module) -> Iterator[Attention]:
    return (part for part in model.modules() if isinstance(part, Attention))


def penalized(model: TransformerWrapper, ids: Tensor, **given: Any) -> list[Tensor]:
    """Return the gradients of the squared gradient of a loss: derivatives of second order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = call(model, ids, **given).square().mean()
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
    second = torch.autograd.grad(penalty, parameters, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in second]


def equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    most = max(float(t.abs().max()) for t in wanted)
    assert 0 < most < float("inf")
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9 * most, rtol=1e-6)


def fixed(model: TransformerWrapper, backend: Any) -> TransformerWrapper:
    """Let all attentions of a model run one backend."""
    for attention in attentions(model):
        attention.attend.backends.fused = (backend,)
        attention.attend._answer = None, None
    return model


def same_as_explicit(model: TransformerWrapper, **given: Any) -> None:
    ids = tokens(2, LENGTH)
    found = penalized(model, ids, **given)
    for attention in attentions(model):
        attention.attend.backends.flash = False
    equal(found, penalized(model, ids, **given))


@FIRSTS
def test_second_derivatives(stack: str, case: Case) -> None:
    # in float64, where rounding stays far below any difference
    same_as_explicit(build(case, stack).double())


HOSTED = (
    {},
    {"attn_kv_heads": 2},
    {"alibi_pos_bias": True},
    {"rel_pos_bias": True, "attn_num_mem_kv": 2},
    {"attn_softclamp_logits": True},
    {"attn_head_learned_sink": True, "attn_max_attend_past": 2},
    {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
    {"attn_use_rel_proj_pos_bias": True},
    {"cross_attend": True},
)


@pytest.mark.parametrize("options", HOSTED, ids=lambda options: next(iter(options), "plain"))
def test_second_derivatives_by_blocks(options: dict[str, Any]) -> None:
    model = fixed(BASE.build(depth=1, **options).double(), Blocked())
    same_as_explicit(model, mask=torch.tensor([[True] * LENGTH, [False, True, True, True, False]]))


@pytest.mark.parametrize("options", HOSTED, ids=lambda options: next(iter(options), "plain"))
def test_forward_mode_is_the_transpose_of_reverse_mode(options: dict[str, Any]) -> None:
    model = BASE.build(depth=1, **options).double()
    ids, direction = tokens(2, LENGTH), torch.randn(2, LENGTH, model.emb_dim, dtype=torch.float64)
    given = other_inputs(model, ids)

    def run(embeds: Tensor) -> Tensor:
        return model(ids, sum_embeds=embeds, **given)

    x = torch.zeros_like(direction)
    out, tangent = torch.func.jvp(run, (x,), (direction,))
    other = torch.randn_like(out)
    (gradient,) = torch.func.vjp(run, x)[1](other)
    torch.testing.assert_close((tangent * other).sum(), (gradient * direction).sum())
    leaf = x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad((run(leaf) * other).sum(), leaf)[0], gradient)


def test_transforms_of_functions() -> None:
    """Hessians, and gradients of single rows, by `torch.func`."""
    model = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False).eval().double()
    x = torch.randn(3, 4, 16, dtype=torch.float64)

    def loss(row: Tensor) -> Tensor:
        return model(row.unsqueeze(0)).square().sum()

    single = torch.func.vmap(torch.func.grad(loss))(x)
    for row, gradient in zip(x, single, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(row), gradient)
    hessian = torch.func.hessian(loss)(x[0]).reshape(64, 64)
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.abs().max() > 0


def test_only_transformed_functions_leave_the_fused_kernel() -> None:
    model: AttentionLayers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    (core,) = (attention.attend for attention in attentions(model))
    ran: list[str] = []
    choose = core.backends._decide

    def noted(*given: Any) -> Any:
        backend, why = choose(*given)
        ran.append(backend.name)
        return backend, why

    core.backends._decide = noted  # type: ignore[method-assign]
    x = torch.randn(1, 4, 16)
    model(x)
    torch.func.jvp(model, (x,), (x,))
    model(x)
    assert ran == ["sdpa", Explicit.name, "sdpa"]
