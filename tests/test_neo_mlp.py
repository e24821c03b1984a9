"""`NeoMLP`: inputs, hidden units and outputs as tokens."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from catalog import close, perturb

from x_transformers import NeoMLP
from x_transformers.errors import ConfigError, ShapeError

SIZES = {"dim_in": 5, "dim_hidden": 6, "dim_out": 7, "dim_model": 16, "depth": 2}


def build(**options: Any) -> NeoMLP:
    return perturb(NeoMLP(**{**SIZES, **options})).eval()


@torch.no_grad()
def test_units_are_tokens() -> None:
    model, x = build(), torch.randn(3, 5)
    out, embeds = model(x, return_embeds=True)
    assert out.shape == (3, 7)
    assert [tuple(t.shape) for t in embeds] == [(3, 5, 16), (3, 6, 16), (3, 7, 16)]
    proj, linear = model.random_fourier[0].proj, model.random_fourier[1]
    features = linear((2 * math.pi * (x[..., None] * proj.weight[:, 0] + proj.bias)).cos()) + model.input_embed
    units = torch.cat((model.hidden_embed, model.output_embed)).expand(3, -1, -1)
    outputs = model.transformer(torch.cat((features, units), dim=1))[:, -7:]
    close(out, torch.einsum("bod,od->bo", outputs, model.to_output_weights) + model.to_output_bias)


@torch.no_grad()
def test_rows_are_apart_and_may_be_one() -> None:
    model, x = build(), torch.randn(3, 5)
    out = model(x)
    for row in range(3):
        single, embeds = model(x[row], return_embeds=True)
        close(single, out[row])
        assert embeds[0].shape == (1, 5, 16)
    close(model(torch.arange(5)), model(torch.arange(5).float()))


def test_all_but_the_random_frequencies_learn() -> None:
    model = build().double()
    out = model(torch.randn(3, 5).double())
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("random_fourier.0"):
            assert not parameter.requires_grad
        else:
            assert parameter.grad.abs().max() > 1e-9, name


@torch.no_grad()
def test_models_are_saved_and_copied() -> None:
    model, x = build(encoder_kwargs={"heads": 2, "attn_dim_head": 4}), torch.randn(3, 5)
    again = NeoMLP.from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    for copied in (again, copy.deepcopy(model)):
        assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("shape", [(3, 1), (1,), (3, 6), (2, 3, 5), ()])
def test_other_widths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"it must be \(batch, 5\) or \(5,\)"):
        build()(torch.zeros(shape))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="`dim_out` is 0"):
        build(dim_out=0)
    with pytest.raises(ConfigError, match="unknown keyword `hedas`"):
        build(encoder_kwargs={"hedas": 2})
