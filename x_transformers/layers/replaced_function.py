"""Calls of a module that a user has put in the place of an attention or a feedforward: `layers[0][1] = module`.

A branch function of this library is called with a `LayerCall`. Any other module is called as the reference calls it: a
feedforward with its input only, an attention with the keyword arguments that its `forward` has, and the output may come
with intermediates. A module that wraps a branch function may pass all arguments on to it; then caches, memories and
what layers leave for each other work as before.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.layers.kinds import BranchKind
from x_transformers.modules.branch_function import BranchFunction


class Convention(NamedTuple):
    """How a replaced branch function is called.

    Attributes:
        wraps: a branch function of this library is inside, and takes the `LayerCall`.
        keeps_states: that function has running states.
        keywords: the other arguments that the module takes; None: any.
    """

    wraps: bool
    keeps_states: bool
    keywords: frozenset[str] | None


def convention_of(module: nn.Module) -> Convention | None:
    """Return how to call the module in the place of a branch function; None for a branch function itself."""
    if isinstance(module, BranchFunction):
        return None
    parameters = inspect.signature(module.forward).parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = None if takes_any else frozenset(each.name for each in parameters)
    inside = [each for each in module.modules() if isinstance(each, BranchFunction)]
    return Convention(bool(inside), any(each.state_names for each in inside), names)


def declarations_of(module: nn.Module) -> BranchFunction:
    """Return the branch function in a place, perhaps inside of a wrapper; or one that declares nothing."""
    return next((each for each in module.modules() if isinstance(each, BranchFunction)), None) or BranchFunction()


def run_replaced(
    module: nn.Module, convention: Convention, kind: BranchKind, x: Tensor, layer: LayerCall
) -> BranchOutput:
    """Run a module in the place of a branch function.

    Args:
        module: the module.
        convention: how it is called.
        kind: kind of the sublayer.
        x: `(b, n, D)` normalized input.
        layer: the sublayer's call.

    Raises:
        InputError: if an attention without cache has to continue one, or without documents is in a packed stack.
    """
    if kind.is_feedforward and not convention.keeps_states:
        out = module(x)
        return BranchOutput(out if layer.deep_embed is None else out * layer.deep_embed, None, layer.carry)
    if convention.wraps:
        given = {"layer": layer, "return_intermediates": True} if kind.is_attention else {"layer": layer}
    else:
        given = _reference_arguments(module, layer)
        known = given if convention.keywords is None else convention.keywords
        given = {name: value for name, value in given.items() if name in known}
    result: Any = module(x, **given)
    if isinstance(result, BranchOutput):
        return result
    out, left = result if isinstance(result, tuple) else (result, None)
    if isinstance(left, BranchOutput):
        return BranchOutput(out, left.record, left.carry)
    return BranchOutput(out, None, layer.carry)


def _reference_arguments(module: nn.Module, layer: LayerCall) -> dict[str, Any]:
    """Return the arguments for an attention that knows no `LayerCall`."""
    call, name = layer.call, type(module).__name__
    if layer.context is None and not call.aligned:
        raise InputError(
            f"the {name} that replaces an attention keeps no keys, so that it cannot continue a cache; run the whole "
            "sequence without one (`cache_kv = False`), or put an `Attention` inside of it and pass `layer` on."
        )
    if layer.documents is not None:
        raise InputError(
            f"the {name} that replaces an attention knows nothing of the documents of a packed row; pass them as rows."
        )
    mask = layer.fresh_token_mask
    given = {"attn_mask": call.attn_mask, "return_intermediates": True}
    if layer.context is not None:
        return {"context": layer.context, "context_mask": mask, **given}
    return {"mask": mask, **given}
