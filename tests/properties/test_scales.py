"""Scales and gates: the factors of scores, branches and streams are those that their options name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor, nn

from x_transformers import Attention, Encoder
from x_transformers.attend import Attend

B, N, D = 2, 5, 8
ONE = {"dim": D, "depth": 1, "heads": 2, "attn_dim_head": 4, "verbose": False, "only_attn": True}


def plain_attention(**options: Any) -> Attention:
    """One head whose four maps are the identity, so that queries, keys and values are the input."""
    attention = Attention(D, dim_head=D, heads=1, **options).eval()
    with torch.no_grad():
        for weight in attention.parameters():
            if weight.shape == (D, D):
                weight.copy_(torch.eye(D))
    return attention


def scores(module: Attention, x: Tensor) -> Tensor:
    _, record = module(x, return_intermediates=True)
    return record.pre_softmax_attn[:, 0]


@torch.no_grad()
def test_scores_are_scaled_by_the_root_of_the_width() -> None:
    x = torch.randn(B, N, D)
    close(scores(plain_attention(), x), x @ x.mT / D**0.5)
    for flash in (None, False):
        wanted = (x @ x.mT / D**0.5).softmax(dim=-1) @ x
        close(plain_attention(flash=flash)(x), wanted)
        q = x.unsqueeze(1)
        close(Attend(flash=flash)(q, q, q)[0].squeeze(1), wanted)
        own = (x @ x.mT * 0.3).softmax(dim=-1) @ x
        close(Attend(flash=flash, scale=0.3)(q, q, q)[0].squeeze(1), own)


@pytest.mark.parametrize("scale", [10, 4.0])
@torch.no_grad()
def test_normalized_queries_have_a_scale_of_their_own(scale: float) -> None:
    x = torch.randn(B, N, D)
    unit = torch.nn.functional.normalize(x, dim=-1)
    close(scores(plain_attention(qk_norm=True, qk_norm_scale=scale), x), scale * unit @ unit.mT)


def stacks(*, norm_add_unit_offset: bool = True, **options: Any) -> tuple[Encoder, Encoder]:
    """Build a stack of one attention with these options, and one without; no final norm, and the same weights."""
    both = {**ONE, "pre_norm_has_final_norm": False, "norm_add_unit_offset": norm_add_unit_offset}
    one, two = (Encoder(**both, **more).eval() for more in (options, {}))
    one.load_state_dict(two.state_dict(), strict=False)
    return one, two


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_layer_scale_multiplies_the_branch(value: float, offset: bool) -> None:
    """By its initial value, whether the stored number is that value or the value less one."""
    scaled, plain = stacks(use_layerscale=True, layerscale_init_value=value, norm_add_unit_offset=offset)
    x = torch.randn(B, N, D)
    close(scaled(x) - x, value * (plain(x) - x))


@torch.no_grad()
def test_a_constant_scales_the_stream() -> None:
    scaled, plain = stacks(scale_residual_constant=0.5)
    x = torch.randn(B, N, D)
    close(scaled(x), plain(x) - 0.5 * x)


@torch.no_grad()
def test_a_number_scales_the_branch() -> None:
    scaled, plain = stacks(scale_residual=0.5)
    x = torch.randn(B, N, D)
    close(scaled(x) - x, 0.5 * (plain(x) - x))


@torch.no_grad()
def test_adaptive_layer_scale_begins_small() -> None:
    """`sigmoid(-2)` of the branch, whatever the condition."""
    scaled, plain = stacks(use_adaptive_layerscale=True, dim_condition=3)
    x = torch.randn(B, N, D)
    close(scaled(x, condition=torch.randn(B, 3)) - x, torch.tensor(-2.0).sigmoid() * (plain(x) - x))


@torch.no_grad()
def test_a_gated_stream_is_the_state_of_a_recurrent_cell() -> None:
    """`GRU(input = branch, state = stream)`."""
    gated, plain = stacks(gate_residual=True)
    (cell,) = (part for part in gated.modules() if isinstance(part, nn.GRUCell))
    x = torch.randn(B, N, D)
    wanted = cell((plain(x) - x).flatten(0, 1), x.flatten(0, 1))
    close(gated(x), wanted.unflatten(0, (B, N)))
