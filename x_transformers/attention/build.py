"""From the options of an attention to its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from x_transformers.attend import Attend, ScoreParts
from x_transformers.attention.backends.choice import BackendChoice
from x_transformers.attention.base import (
    AttentionShape,
    KeyMod,
    MakeMap,
    Parts,
    QKNorm,
    RowMod,
    ScoreMod,
    Similarity,
    Slot,
    ValueMod,
    Weighting,
    WeightMod,
)
from x_transformers.attention.catalog import SCHEMA
from x_transformers.attention.heavy import HeavyPlan, plan_heavy
from x_transformers.attention.keys.sink import LearnedSink
from x_transformers.attention.latent import LatentKeysValues
from x_transformers.attention.output_projection import build_output
from x_transformers.attention.projections import Projections
from x_transformers.attention.subsampling import KeySubsampling
from x_transformers.attention.switch_head import HeadSwitch
from x_transformers.attention.values.residual import ValueMix
from x_transformers.errors import ConfigError, Faults
from x_transformers.modules.norms import RMSNorm
from x_transformers.options.schema import at_least


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionParts:
    """Parts of one attention, and the settings that its passes read.

    Attributes:
        shape: widths and numbers of heads.
        dim_context: width of the input of keys and values.
        features: names of the options that are on.
        switches: the keyword that switched on each of them.
        takes_views: the input is that of queries, keys and values, `(3, b, n, D)`.
        window: numbers of earlier and of later slots that a query sees; None for all.
        packed: rows are packed.
        sublayer_dropout: dropout of the output.
        unrotated_heads: numbers of query and key heads, from the first on, that are not rotated; None if all are.
        latent_q, ..., out: the modules, in the order of the state dict.
        heavy: what a second attention is built from, or None.
        attend: the core, which reads the parts that change scores and weights.
        subsampling: what runs the core over a share of the keys, in training; or None.
    """

    shape: AttentionShape
    dim_context: int
    features: tuple[str, ...]
    switches: Mapping[str, str]
    takes_views: bool
    window: tuple[int | None, int | None]
    packed: bool
    sublayer_dropout: float
    unrotated_heads: tuple[int, int] | None
    latent_q: nn.Linear | None
    latent_q_norm: RMSNorm | None
    latent_kv: LatentKeysValues | None
    projections: Projections
    switch: HeadSwitch | None
    qk_norms: Slot[QKNorm]
    scores: Slot[ScoreMod]
    keys: Slot[KeyMod]
    metrics: Slot[Similarity]
    sink: LearnedSink | None
    rows: Slot[RowMod]
    weighting: Slot[Weighting]
    weights: Slot[WeightMod]
    values: Slot[ValueMod]
    value_mix: ValueMix | None
    out: nn.Module
    heavy: HeavyPlan | None
    attend: Attend
    subsampling: KeySubsampling | None


def build_parts(dim: int, heads: int, causal: bool, options: Mapping[str, Any]) -> AttentionParts:
    """Build the parts of an attention.

    Args:
        dim: width of the input.
        heads: number of query heads.
        causal: a token sees only tokens up to itself.
        options: by keyword.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict.
    """
    faults = Faults()
    parsed = SCHEMA.parse(dict(options), faults, others=("dim", "heads", "causal"))
    SCHEMA.check_choices(parsed, faults)
    SCHEMA.check_rules(parsed, parsed, faults)
    faults.raise_if_any("Attention")
    at_least(1, dim=dim, heads=heads)

    head = parsed["heads"]
    shape = AttentionShape(
        dim=dim,
        heads=heads,
        kv_heads=parsed["grouped_heads"].count(heads),
        dim_head=head.dim_head,
        value_dim_head=head.dim_head if head.value_dim_head is None else head.value_dim_head,
        causal=causal,
    )
    source = dim if parsed["context"].dim_context is None else parsed["context"].dim_context
    make = parsed["param_tokens"].build if parsed.on("param_tokens") else None
    modules: dict[str, Any] = {}
    unrotated: tuple[int, int] | None = None
    with faults.catching():
        unrotated = _unrotated_heads(parsed, shape)
        modules |= _build_projections(parsed, shape, source, make)
    for name, slot in SLOTS.items():
        modules[name] = _build_slot(slot, parsed, shape, faults)
    modules["sink"] = next(iter(modules["sink"]), None)
    modules["value_mix"] = ValueMix(shape) if parsed.on("value_mix") else None
    width = shape.value_dim_head
    for mod in modules["values"]:
        width = mod.out_width(width)
    with faults.catching():
        gated, output = parsed.on("on_attn"), parsed["attention_output"]
        modules["out"] = build_output(
            shape,
            heads * width,
            output,
            gated=gated,
            bias=parsed["projection_bias"].out_bias,
            make=make,
            experts=parsed["switch_head"].switch_experts,
        )
    with faults.catching():
        modules["heavy"] = plan_heavy(parsed, heads, causal)
    switches: dict[str, str] = {}
    window = parsed["window"].max_attend_past, parsed["window"].max_attend_future
    with faults.catching():
        if causal and window[1] is not None:
            raise ConfigError(
                "`max_attend_future` limits the future that a query sees, and causal attention sees none; drop it, or "
                "use an Encoder."
            )
        switches = {feature.name: parsed.switch(feature) for feature in parsed.enabled()}
        modules["attend"] = _build_core(parsed, modules, switches, causal=causal, window=window)
        modules["subsampling"] = _build_subsampling(parsed, modules, switches)
    faults.raise_if_any("Attention")
    return AttentionParts(
        shape=shape,
        dim_context=source,
        features=tuple(switches),
        switches=switches,
        takes_views=head.qkv_receive_diff_residuals,
        window=window,
        packed=parsed["backend"].flash_pack_seq,
        sublayer_dropout=parsed["attention_dropout"].sublayer_dropout,
        unrotated_heads=unrotated,
        **modules,
    )


SLOTS = {
    "qk_norms": "qk_norm",
    "scores": "score",
    "keys": "keys",
    "metrics": "metric",
    "sink": "sink",
    "rows": "row",
    "weighting": "weighting",
    "weights": "weights",
    "values": "values",
}
"""Attributes of an attention that hold the parts of a slot, and the slots."""


def _unrotated_heads(parsed: Any, shape: AttentionShape) -> tuple[int, int] | None:
    """Return the numbers of query and key heads, from the first on, that are not rotated; None if all are."""
    sub, unrotated = parsed["latent"].latent_rope_subheads, parsed["heads"].unrotated_heads(shape.heads, shape.kv_heads)
    if sub is None:
        return unrotated
    # the last key heads, and the query heads that use them
    return shape.heads - sub * shape.heads // shape.kv_heads, shape.kv_heads - sub


def _build_projections(parsed: Any, shape: AttentionShape, source: int, make: MakeMap | None) -> dict[str, Any]:
    """Build what makes queries, keys and values of the input: latents, the maps to heads, and the choice among these.

    Args:
        parsed: options by feature.
        shape: of the attention.
        source: width of the source of keys and values.
        make: builds maps, if they are not linear.
    """
    latent, bias, switch = parsed["latent"], parsed["projection_bias"].qkv_bias, parsed["switch_head"]
    sub, shared = latent.latent_rope_subheads or 0, parsed["latent_rope"].latent_rope_dim or 0
    dim = shape.dim
    modules: dict[str, Any] = {"latent_q": None, "latent_q_norm": None, "latent_kv": None}
    if latent.use_latent_q:
        dim = latent.dim_latent_q
        modules["latent_q"] = nn.Linear(shape.dim, dim, bias=False)
        modules["latent_q_norm"] = parsed["latent_norm"].build(dim)
    if latent.use_latent_kv:
        norm = parsed["latent_norm"].build(latent.dim_latent_kv)
        given = {"bias": bias, "shared": shared, "norm": norm}
        modules["latent_kv"] = LatentKeysValues(shape, source, latent.dim_latent_kv, sub, **given)
    to_heads = None if make is None else (lambda dim, heads, width: make(dim, heads * width))
    mixtures = switch.maps_to_heads(bias)
    modules["projections"] = Projections(
        dim=dim,
        dim_context=latent.dim_latent_kv if latent.use_latent_kv else source,
        heads=shape.heads,
        key_heads=0 if shared == shape.dim_head else shape.kv_heads - sub,
        kv_heads=shape.kv_heads,
        dim_head=shape.dim_head,
        key_dim_head=shape.dim_head - shared,
        value_dim_head=shape.value_dim_head,
        bias=bias,
        clip=parsed["qkv_clip"].qkv_clip,
        makers=(
            mixtures if switch.switch_queries_keys else to_heads,
            parsed["gin"].slices or mixtures or to_heads,
        ),
    )
    modules["switch"] = switch.build(shape, source)
    return modules


def _build_slot(slot: str, parsed: Any, shape: AttentionShape, faults: Faults) -> Any:
    """Build the parts of one slot."""
    parts: dict[str, nn.Module] = {}
    for feature in parsed.parts():
        make = feature.build if feature.slot == slot else feature.also.get(slot)
        if make is None:
            continue
        with faults.catching():
            part = make(parsed[feature.name], shape=shape, others=parsed)
            if part is not None:
                parts[feature.name] = part
    return Parts(parts) if parts else ()


def _build_core(
    parsed: Any,
    modules: Mapping[str, Any],
    switches: Mapping[str, str],
    *,
    causal: bool,
    window: tuple[int | None, int | None],
) -> Attend:
    """Build the core. Its messages name the keyword that switched on each part."""
    head = parsed["heads"]
    scale = head.dim_head**-0.5 if head.scale is None else head.scale
    for norm in modules["qk_norms"]:
        scale = norm.scale if norm.scale is not None else scale
    sink, options = modules["sink"], parsed["backend"]
    slots = {name: modules[name] for name in ("scores", "metrics", "rows", "weighting", "weights")}
    named = [
        (switches[name], part)
        for slot in ("scores", "rows", "weighting", "weights", "values")
        for name, part in (modules[slot].items() if modules[slot] else ())
    ]
    return Attend.of_parts(
        ScoreParts(sink=sink, **slots),
        named if sink is None else [*named, (switches["learned_sink"], sink)],
        causal=causal,
        scale=scale,
        dropout=parsed["attention_dropout"].dropout,
        window=window,
        backends=BackendChoice(flash=options.flash, kernels=options.attend_sdp_kwargs, packed=options.flash_pack_seq),
        packed=options.flash_pack_seq,
    )


def _build_subsampling(parsed: Any, modules: Mapping[str, Any], switches: Mapping[str, str]) -> KeySubsampling | None:
    """Build what draws keys, if anything does; it has a core of its own where no part reads pairs of tokens."""
    options = parsed["key_subsampling"]
    if options.subsample_keys is None:
        return None
    reads_pairs = any(modules[slot] for slot in ("scores", "metrics", "rows", "weighting", "weights"))
    core = None
    if not reads_pairs:
        core = _build_core(parsed, modules, switches, causal=False, window=(None, None))
    return KeySubsampling(options.subsample_keys, options.subsample_local, core)
