"""How the parts of one sublayer are put together, from the plan of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from x_transformers.attention.attention import Attention
from x_transformers.errors import ConfigError, Faults
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.norm_placement import norm_places
from x_transformers.layers.branches.output_init import output_keywords, output_scale
from x_transformers.layers.branches.shift import TokenShift
from x_transformers.layers.execution_order import LayerSequence
from x_transformers.layers.plan import LayerPlan, StackPlan
from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.layers.residuals.plain import plain_residual
from x_transformers.layers.views import residual_views
from x_transformers.modules.norms import LayerNorm
from x_transformers.options.schema import Options


class Stack(Protocol):
    """What a sublayer's making reads of its stack."""

    dim: int
    causal: bool
    looks_back: bool
    sequence: LayerSequence
    layer_types: tuple[str, ...]


def build_branch(stack: Stack, plan: StackPlan, layer: LayerPlan, index: int, norm: Any) -> Branch:
    """Sublayer `index` of a stack, with all that surrounds it."""
    options, dim = plan.options, stack.dim
    keywords = {**layer.keywords, **output_keywords(options, index // stack.sequence.block + 1)}
    fn: Attention | FeedForward
    if layer.kind == "f":
        fn = FeedForward(dim, **keywords)
    else:
        heads = options["structure"].heads
        keywords |= _value_residual(plan, layer, index)
        fn = Attention(dim, heads=heads, causal=stack.causal and layer.kind == "a", **keywords)
        fn.leaves_values = options.on("value_residual")
        if options["residual_scores"].shared(layer.kind):
            fn.share_scores()
        if (stack.causal or stack.looks_back) and fn.across_queries:
            raise ConfigError(
                "`inverted_attention` normalises over the queries, so that in a causal stack earlier tokens would "
                "see later ones; use an Encoder or a CrossAttender, or drop it."
            )
    where, factor = norm_places(options), output_scale(options)
    if layer.kind == "f" and options["macaron"].macaron:
        factor *= 0.5
    place = SublayerContext(
        dim=dim,
        index=index,
        kind=layer.kind,
        causal=stack.causal,
        options=options,
        first=layer.kind not in stack.layer_types[:index],
        views=residual_views(options, layer.kind),
        norm=norm,
    )
    skip, shift = (
        _each(value, index) for value in (options["layer_dropout"].layer_dropout, options["shift_tokens"].shift_tokens)
    )
    return Branch(
        layer.kind,
        fn,
        _one(options, "residual", place) or plain_residual(place),
        reader=_one(options, "reader", place),
        norm=norm(dim) if where.before else None,
        shift=TokenShift(shift, dim, stack.causal or stack.looks_back) if shift else None,
        output_norm=norm(dim) if where.output else None,
        stream_norm=norm(dim) if where.after else None,
        scale=_one(options, "branch scale", place),
        output_scale=factor,
        dropout=skip,
    )


def _one(options: Options, slot: str, place: SublayerContext) -> Any:
    """The part that a slot's feature builds for one sublayer, or None if no feature of the slot is on."""
    chosen = options.enabled(slot)
    if not chosen:
        return None
    assert chosen[0].build is not None
    return chosen[0].build(options[chosen[0].name], place)


def _value_residual(plan: StackPlan, layer: LayerPlan, index: int) -> dict[str, bool]:
    """The keyword of a self-attention that learns how much of the first one's values it takes: all but the first."""
    first = next((at for at, each in enumerate(plan.layers) if each.kind == "a"), None)
    learned = plan.options.on("value_residual") and plan.options["value_residual"].learned_value_residual_mix
    return {"learned_value_residual_mix": True} if learned and layer.kind == "a" and index != first else {}


def check_value_residual(kinds: Sequence[Sequence[Branch]], faults: Faults) -> None:
    """Values of one layer can be mixed into another's of its kind only if they are alike."""
    for branches in kinds:
        layers = [branch.attention for branch in branches]
        if len({(fn.kv_heads, fn.shape.value_dim_head, fn.latent_kv is None) for fn in layers}) > 1:
            faults.add(
                "`add_value_residual` mixes the first layer's values into those of others, but `attn_kv_heads`, "
                "`attn_value_dim_head` or `attn_use_latent_kv` differ between layers; give one value."
            )


def _each(value: Any, index: int) -> Any:
    """One sublayer's value of an option that may be one value or a tuple of them."""
    return value[index] if isinstance(value, tuple) else value


def norm_of(plan: StackPlan) -> Any:
    """A maker of the chosen norm, by width."""
    offset = plan.options["norm"].norm_add_unit_offset
    chosen = plan.options.enabled("norm")
    build: Any = chosen[0].build if chosen else LayerNorm
    return lambda dim: build(dim, unit_offset=offset, options=plan.options)
