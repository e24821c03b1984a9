"""Building the sublayers of a stack from its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from x_transformers.attention.attention import Attention
from x_transformers.errors import Faults
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.norm_placement import norm_places
from x_transformers.layers.branches.output_init import output_keywords, output_scale
from x_transformers.layers.branches.shift import TokenShift
from x_transformers.layers.plan import StackPlan
from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.layers.residuals.plain import plain_residual
from x_transformers.layers.views import residual_views
from x_transformers.modules.norms import Norm, NormOptions, build_layer_norm
from x_transformers.options.schema import Options


class BuiltStack(Protocol):
    """Attributes of a stack that its sublayers are built from."""

    dim: int
    causal: bool
    looks_back: bool


def build_branch(stack: BuiltStack, plan: StackPlan, index: int, norm: Callable[[int], Norm]) -> Branch:
    """Build sublayer `index` of a stack, with its residual connection, norms and scales."""
    layer, options, dim = plan.layers[index], plan.options, stack.dim
    hides_future = stack.causal or stack.looks_back
    number = sum(each.kind is layer.kind for each in plan.layers[:index])
    context = SublayerContext(
        dim=dim,
        index=index,
        kind=layer.kind,
        causal=stack.causal,
        options=options,
        first=number == 0,
        views=residual_views(options, layer.kind),
        norm=norm,
    )
    keywords = {**layer.keywords, **output_keywords(options, index // plan.sequence.block + 1)}
    choice = layer.kind.chosen_by
    alike = [each for each in plan.layers[:index] if each.kind is layer.kind]
    if choice is not None:
        alike = [each for each in alike if each.keywords[choice] == layer.keywords[choice]]
    fn = layer.kind.build(dim, keywords, options, causal=stack.causal, hides_future=hides_future, first=not alike)
    fn.begin_at(number, len(plan.of(layer.kind.letter)))
    where, halved = norm_places(options), layer.kind.is_feedforward and options["macaron"].macaron
    skip, shift = (
        _each(value, index) for value in (options["layer_dropout"].layer_dropout, options["shift_tokens"].shift_tokens)
    )
    return Branch(
        layer.kind,
        fn,
        _one(options, "residual", context) or plain_residual(context),
        reader=_one(options, "reader", context),
        norm=norm(dim) if where.before and (index > 0 or where.first) else None,
        shift=TokenShift(shift, dim, hides_future) if shift else None,
        output_norm=norm(dim) if where.output else None,
        stream_norm=norm(dim) if where.after else None,
        scale=_one(options, "branch scale", context),
        output_scales=(output_scale(options), 0.5) if halved else (output_scale(options),),
        dropout=skip,
    )


def _one(options: Options, slot: str, context: SublayerContext) -> Any:
    """Build the part of a slot for one sublayer; None if no feature of the slot is on."""
    enabled = options.enabled(slot)
    if not enabled:
        return None
    assert enabled[0].build is not None
    return enabled[0].build(options[enabled[0].name], context)


def _each(value: Any, index: int) -> Any:
    """Return one sublayer's value of an option that may be one value or a tuple of them."""
    return value[index] if isinstance(value, tuple) else value


def check_value_residual(branches: Sequence[Branch], faults: Faults) -> None:
    """Add a fault if the attentions of one kind have values of different shapes, which cannot be mixed."""
    layers = [branch.fn for branch in branches if isinstance(branch.fn, Attention)]
    if len({(fn.kv_heads, fn.shape.value_dim_head, fn.latent_kv is None) for fn in layers}) > 1:
        faults.add(
            "`add_value_residual` mixes the first layer's values into those of others, but `attn_kv_heads`, "
            "`attn_value_dim_head` or `attn_use_latent_kv` differ between layers; give one value."
        )


def norm_of(plan: StackPlan) -> Callable[[int], Norm]:
    """Return a function that builds the chosen norm for a width."""
    chosen: NormOptions = plan.options["norm"]
    enabled = plan.options.enabled("norm")
    build: Any = enabled[0].build if enabled else build_layer_norm
    given: dict[str, Any] = {"unit_offset": chosen.norm_add_unit_offset, "options": plan.options}
    if chosen.norm_eps is not None:
        given["eps"] = chosen.norm_eps
    if chosen.norm_bias:
        given["bias"] = True
    return lambda dim: build(dim, **given)
