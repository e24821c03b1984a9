"""Replaced linear maps, norms, embeddings and heads are the ones that run, in every kind of pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from catalog import Case, call, cases, close, name_of, one_of_each, perturb, perturbed, tokens
from kinds import KINDS, Kind
from promises import every_output
from properties.test_generation import arguments
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    Encoder,
    NeoMLP,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
)
from x_transformers.modules.lora import LoRALinear
from x_transformers.modules.norms import MultiheadRMSNorm, Norm

REPLACEABLE = (nn.RNNBase, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, Norm, MultiheadRMSNorm, LoRALinear)
PROMPT, NEW = 5, 4


class Adapter(nn.Module):
    """A user's module around a part of the model: `inner(x) * (1 + scale) + offset`, with learned scale and offset."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.scale, self.offset = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.05))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        out, *states = (
            self.inner(*args, **kwargs) if isinstance(self.inner, nn.RNNBase) else (self.inner(*args, **kwargs),)
        )
        # an offset along an axis of signs, which a norm does not remove as it would a constant
        signs = 1 - 2 * (torch.arange(out.shape[-1], device=out.device) % 2)
        out = out * (1 + self.scale) + self.offset * signs.to(out.dtype)
        return (out, *states) if states else out


def adapt(model: nn.Module) -> dict[str, Adapter]:
    """Put an adapter in the place of every linear map, norm and embedding, and return them by name."""
    adapters = {}
    for name, parent in list(model.named_modules()):
        for attribute, child in list(parent.named_children()):
            if isinstance(child, REPLACEABLE) and not isinstance(parent, Adapter):
                adapters[f"{name}.{attribute}"] = Adapter(child)
                setattr(parent, attribute, adapters[f"{name}.{attribute}"])
    return adapters


def silent(adapters: dict[str, Adapter], without_gradient: Sequence[re.Pattern[str]] = ()) -> list[str]:
    """Return the adapters that were not called, or whose scale and offset changed nothing."""
    return [
        name
        for name, adapter in adapters.items()
        if not adapter.calls
        or not (
            any(pattern.search(f"{name}.") for pattern in without_gradient)
            or any(p.grad is not None and p.grad != 0 for p in (adapter.scale, adapter.offset))
        )
    ]


def running(model: TransformerWrapper, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters of layers that run: an order of execution may leave some out."""
    layers = model.attn_layers.layers
    idle = set(range(len(layers))) - set(model.attn_layers.layers_execute_order)
    left_out = tuple(f"attn_layers.layers.{index}." for index in idle)
    return {name: adapter for name, adapter in adapters.items() if not name.startswith(left_out)}


def sum_of_squares(out: Any) -> Tensor:
    outs = out if isinstance(out, tuple) else (out,)
    return torch.stack([each.square().mean() for each in outs]).sum()


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_a_pass_calls_them_and_depends_on_them(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, PROMPT)
    with torch.no_grad():
        call(model, ids)
    adapters = running(model, adapt(model))
    sum_of_squares(every_output(model, ids)).backward()
    assert silent(adapters, case.without_gradient()) == []


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="generation"), ids=name_of)
@torch.no_grad()
def test_prepared_decoding_calls_them(stack: str, case: Case) -> None:
    """What a generation prepares is made of the parts in place when it begins, also after an earlier generation."""
    model = case.build(stack)
    wrapper, prompt = AutoregressiveWrapper(model), tokens(2, PROMPT)
    given = arguments(model, prompt)
    wrapper.generate(prompt, 2, temperature=0.0, **given)
    adapters = running(model, adapt(model))
    new = wrapper.generate(prompt, NEW, temperature=0.0, **given)
    assert [name for name, adapter in adapters.items() if not adapter.calls] == []
    logits = call(model, torch.cat((prompt, new), dim=1))[:, PROMPT - 1 : -1]
    close(logits.gather(-1, new.unsqueeze(-1)).squeeze(-1), logits.amax(dim=-1), 1e-4)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder"), ids=name_of)
def test_names_of_state_dicts_stay(stack: str, case: Case) -> None:
    """A replacement has the place of what it replaces, and the weights of the one load into the other."""
    model = case.build(stack)
    other, ids = copy.deepcopy(model), tokens(2, PROMPT)
    for parent in list(other.modules()):
        for attribute, child in list(parent.named_children()):
            if isinstance(child, REPLACEABLE):
                setattr(parent, attribute, perturb(copy.deepcopy(child)))
    assert list(other.state_dict()) == list(model.state_dict())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    other.load_state_dict(model.state_dict())
    close(call(other, ids), call(model, ids))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_models(kind: Kind) -> None:
    model = kind.build()
    adapters, inputs = adapt(model), kind.draw(2, PROMPT)
    out = kind.run(model, inputs)
    sum_of_squares(out).backward()
    assert silent(adapters) == []
    close(kind.decode(model, inputs, [2, 1, 2]), out)


def test_an_encoder_and_a_decoder_with_one_table() -> None:
    options = {"num_tokens": 20, "depth": 1, "heads": 2, "max_seq_len": 16}
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in options.items()}
    model = perturbed(XTransformer(dim=16, tie_token_emb=True, **sides))
    adapters = adapt(model)
    loss = model(tokens(2, PROMPT) % 20, tokens(2, PROMPT) % 20)
    loss.backward()
    assert silent(adapters) == []


def test_pictures() -> None:
    layers = Encoder(dim=16, depth=1, heads=2, verbose=False)
    model = ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=layers, num_classes=3, post_emb_norm=True)
    adapters = adapt(perturbed(model))
    sum_of_squares(model(torch.randn(2, 3, 8, 8))).backward()
    assert silent(adapters) == []


def test_scattered_numbers() -> None:
    model = perturbed(NeoMLP(dim_in=2, dim_out=3, dim_hidden=2, dim_model=16, depth=1, encoder_kwargs={"heads": 2}))
    adapters = adapt(model)
    sum_of_squares(model(torch.randn(2, 2))).backward()
    assert silent(adapters) == []
