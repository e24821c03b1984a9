"""Growth of models that attend to parameters, which leaves their function as it is (TokenFormer, 2410.23168)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.attention.attention import Attention
from x_transformers.errors import ConfigError
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.layers.experts import TrainsExperts, stack_of
from x_transformers.layers.kinds import KINDS
from x_transformers.layers.stack import LayerStack
from x_transformers.models.to_experts import mult_for
from x_transformers.modules.param_attention import ParamAttention, ParamWeights
from x_transformers.options.schema import default_of
from x_transformers.options.values import accepts, shown

Tokens = tuple[nn.Linear, ParamWeights, nn.Linear]
"""Keys, weighting and values of parameter tokens."""


@torch.no_grad()
def grow_param_tokens_(model: nn.Module, tokens: int, *optimizers: Optimizer) -> None:
    """Add parameter tokens to every map of a model that attends to some, in place, without changing what it computes.

    Keys of new tokens are zero, so that their weights are. Their values are random, and learn as soon as the keys have
    changed. The factors of the weights stay as they are, in `param_scale` of the configuration, which has the new
    numbers of tokens: `from_config` builds the grown model.

    Args:
        model: a stack, or a model with a stack as `attn_layers`.
        tokens: number of new tokens of each map, at least 1.
        optimizers: of its parameters. They get the new ones, and their states are extended by zeros. Others have to be
            built again, since each grown parameter is a new object.

    Raises:
        ConfigError: if the model attends to no parameters, or by a softmax, in which old tokens would lose weight.
    """
    if not accepts(int, tokens) or tokens < 1:
        raise ConfigError(f"`tokens` is {shown(tokens)}; it must be a whole number, at least 1.")
    if not isinstance(model, TrainsExperts):
        raise ConfigError(
            f"`model` is {shown(model)}; it must be a stack, or a model with a stack as `attn_layers`, without what is "
            "around it."
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"`optimizers` contains {shown(optimizer)}; they must be optimizers of `torch.optim`.")
    stack = stack_of(model)
    found = {id(fn): (fn, list(_tokens_of(fn))) for fn in (branch.fn for branch in stack.sublayers)}
    grown = [(fn, maps) for fn, maps in found.values() if maps]
    if not grown:
        raise ConfigError(
            "the model attends to no parameters; build it with `ff_param_attention` or `attn_param_tokens`."
        )
    for _, maps in grown:
        for keys, weights, values in maps:
            _check(keys, weights, values)
    for fn, maps in grown:
        for keys, weights, values in maps:
            total = keys.out_features + tokens
            new_keys = keys.weight.new_zeros(tokens, keys.in_features)
            new_values = values.weight.new_empty(values.out_features, tokens).normal_(std=total**-0.5)
            _extend(keys, new_keys, 0, optimizers)
            _extend(values, new_values, 1, optimizers)
            keys.out_features = values.in_features = total
            _note(fn, total, weights.scale)
    _note_in_stack(stack)


def _tokens_of(fn: nn.Module) -> Iterator[Tokens]:
    """Yield the parameter tokens of the maps of a branch function."""
    if isinstance(fn, FeedForward) and isinstance(fn.activation, ParamWeights):
        yield fn.up, fn.activation, fn.down
    elif isinstance(fn, Attention):
        # second names lead to the same maps
        for module in {id(module): module for module in fn.modules()}.values():
            if isinstance(module, ParamAttention):
                yield module.keys, module.weights, module.values


def _check(keys: nn.Module, weights: ParamWeights, values: nn.Module) -> None:
    """Raise a `ConfigError` if tokens cannot be added."""
    if weights.kind == "softmax":
        raise ConfigError(
            "new tokens would take weight from the old ones in the softmax of `param_attention`, which changes what "
            "the model computes; train it with 'l2_gelu' or 'gelu_l2' to grow it."
        )
    for each in (keys, values):
        if type(each) is not nn.Linear:
            raise ConfigError(
                f"parameter tokens are rows of `nn.Linear` maps, and a {type(each).__name__} is in the place of one; "
                "grow the model before such maps are replaced."
            )


def _extend(linear: nn.Linear, new: Tensor, axis: int, optimizers: Sequence[Optimizer]) -> None:
    """Extend the weight of a linear map along an axis, and the states of optimizers by zeros."""
    old = linear.weight
    linear.weight = nn.Parameter(torch.cat((old, new), dim=axis), requires_grad=old.requires_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [linear.weight if each is old else each for each in group["params"]]
        state = optimizer.state.pop(old, None)
        if not state:
            continue
        # what does not have the shape of the parameter (factored moments) begins again
        if all(
            not isinstance(value, Tensor) or value.ndim == 0 or value.shape == old.shape for value in state.values()
        ):
            optimizer.state[linear.weight] = {
                name: torch.cat((value, value.new_zeros(new.shape)), dim=axis)
                if isinstance(value, Tensor) and value.ndim
                else value
                for name, value in state.items()
            }


def _note(fn: Any, total: int, scale: float) -> None:
    """Write the new number of tokens, and the old factor, into the configuration of a branch function."""
    size = {"mult": mult_for(total, fn.dim)} if isinstance(fn, FeedForward) else {"param_tokens": total}
    fn._config["options"].update({**size, "param_scale": scale})


def _note_in_stack(stack: LayerStack) -> None:
    """Write numbers of tokens and factors of all layers into the configuration of their stack."""
    options: dict[str, Any] = stack._config["options"]  # type: ignore[attr-defined]
    for letter, kind in KINDS.items():
        layers = [vars(branch.fn).get("_config", {}).get("options", {}) for branch in stack.branches(letter)]
        for name in ("mult", "param_tokens", "param_scale"):
            if name not in kind.schema.fields or not any("param_scale" in layer for layer in layers):
                continue
            values = [layer.get(name, default_of(kind.schema.fields[name])) for layer in layers]
            options[kind.prefix + name] = values if any(value != values[0] for value in values) else values[0]
