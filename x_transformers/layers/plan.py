"""From a call of keywords to a plan of layers: pure data, every fault at once, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.errors import Faults, did_you_mean
from x_transformers.layers.catalog import ATTENTION, FEEDFORWARD, STACK
from x_transformers.layers.execution_order import LayerSequence, layer_sequence
from x_transformers.options.per_layer import distribute
from x_transformers.options.schema import Options, Surroundings, accepts

SUPPLIED = {
    "attn_heads": "`heads`",
    "attn_causal": "an Encoder or a Decoder",
    "attn_dim": "`dim`",
    "attn_rotate_num_heads": "`rotate_num_heads`",
    "attn_qkv_receive_diff_residuals": "`qkv_receive_diff_residuals`",
    "cross_attn_heads": "`heads`",
    "attn_learned_value_residual_mix": "`learned_value_residual_mix`",
    "cross_attn_learned_value_residual_mix": "`add_value_residual`, which mixes by 1/2 there",
    "attn_dim_out": "`dim`",
    "ff_dim_out": "`dim`",
    "ff_dim": "`dim`",
}
"""Keywords of a sublayer that the stack itself sets, and by what."""

SENSELESS = {
    "cross_attn_causal": "would let a token see the context up to a place that depends on how many tokens follow",
    "cross_attn_qkv_receive_diff_residuals": "would give keys and values inputs beside the context",
}
"""Keywords that cross-attention cannot have, and why."""


SCHEMAS = {"a": (ATTENTION, "attn_"), "c": (ATTENTION, "cross_attn_"), "f": (FEEDFORWARD, "ff_")}
"""The keywords of each kind of sublayer, and the prefix that users write."""


@dataclass(frozen=True)
class LayerPlan:
    """One built sublayer: "a" self-attention, "c" cross-attention, "f" feedforward, and its keywords."""

    kind: str
    keywords: Mapping[str, Any]
    options: Options


@dataclass(frozen=True)
class StackPlan:
    """A stack: its own options, its sublayers in order, and sentences for the user."""

    options: Options
    layers: tuple[LayerPlan, ...]
    sequence: LayerSequence
    warnings: tuple[str, ...]

    def of(self, kind: str) -> list[LayerPlan]:
        """The sublayers of one kind."""
        return [layer for layer in self.layers if layer.kind == kind]


def make_plan(name: str, given: Mapping[str, Any]) -> StackPlan:
    """Sort keywords, distribute per-layer values, and check every layer.

    Raises:
        ConfigError: with all faults of the call.
    """
    faults = Faults()
    groups = _route(given, faults)
    options = STACK.parse(groups["stack"], faults)
    sequence = LayerSequence((), (), 1, 0, True)
    with faults.catching():
        sequence = layer_sequence(options)
    kinds = sequence.kinds
    counts = {kind: kinds.count(kind) for kind in "acf"}
    if kinds and options["structure"].cross_attend and not counts["c"]:
        faults.add("`cross_attend` reads a context, but no cross-attention is among the layers; change their list.")
    if not counts["c"] and groups["cross"]:
        faults.add(f"`cross_attn_{next(iter(groups['cross']))}` needs `cross_attend = True`.")
    if "dim_context" in groups["attn"] and counts["a"]:
        faults.add("`attn_dim_context` belongs to cross-attention; write `cross_attn_dim_context`.")
    for keyword, value in (
        ("layer_dropout", options["layer_dropout"].layer_dropout),
        ("shift_tokens", options["shift_tokens"].shift_tokens),
    ):
        if isinstance(value, tuple) and len(value) != len(kinds):
            faults.add(f"`{keyword}` holds {len(value)} values, but there are {len(kinds)} sublayers.")

    keywords = {
        "a": distribute(groups["attn"], counts["a"], ATTENTION, faults, "attn_", "self-attention"),
        "c": distribute(_cross(groups, counts["a"]), counts["c"], ATTENTION, faults, "cross_attn_", "cross-attention"),
        "f": distribute(groups["ff"], counts["f"], FEEDFORWARD, faults, "ff_", "feedforward"),
    }
    layers = []
    for kind in kinds:
        schema, prefix = SCHEMAS[kind]
        mine = keywords[kind].pop(0) if keywords[kind] else {}
        parsed = schema.parse(mine, faults, prefix)
        schema.check_choices(parsed, faults, prefix)
        layers.append(LayerPlan(kind, mine, parsed))

    STACK.check_choices(options, faults)
    warnings = STACK.without_effect(options, groups["stack"])
    for layer in layers:
        schema, prefix = SCHEMAS[layer.kind]
        surroundings = Surroundings((options, layer.options) if layer.kind != "c" else (layer.options,), layer.kind)
        schema.check_rules(layer.options, surroundings, faults, prefix)
        if layer.kind == "a":
            STACK.check_rules(options, surroundings, faults)
        warnings += schema.without_effect(layer.options, layer.keywords, prefix)
        warnings += schema.unwise(layer.options, surroundings)
    if not counts["a"]:
        STACK.check_rules(options, Surroundings((options,)), faults)
    warnings += STACK.unwise(options, Surroundings((options,)))
    faults.raise_if_any(name)
    return StackPlan(options, tuple(layers), sequence, tuple(dict.fromkeys(warnings)))


def _route(given: Mapping[str, Any], faults: Faults) -> dict[str, dict[str, Any]]:
    """Split keywords by prefix. The stack's own names come first, since some of them begin with a prefix."""
    groups: dict[str, dict[str, Any]] = {"stack": {}, "attn": {}, "cross": {}, "ff": {}}
    known = {
        "cross_attn_": ("cross", ATTENTION),
        "attn_": ("attn", ATTENTION),
        "ff_": ("ff", FEEDFORWARD),
    }
    every = [*STACK.owner, *(prefix + name for prefix, (_, schema) in known.items() for name in schema.owner)]
    for keyword, value in given.items():
        if keyword in SUPPLIED:
            faults.add(f"`{keyword}` is set by the stack; use {SUPPLIED[keyword]}.")
            continue
        if value and keyword in SENSELESS:
            faults.add(f"`{keyword}` {SENSELESS[keyword]}; drop it.")
            continue
        if keyword in SENSELESS:
            continue
        if keyword in STACK.owner:
            groups["stack"][keyword] = value
            continue
        for prefix, (group, schema) in known.items():
            if keyword.startswith(prefix) and keyword[len(prefix) :] in schema.owner:
                groups[group][keyword[len(prefix) :]] = value
                break
        else:
            faults.add(f"unknown keyword `{keyword}`.{did_you_mean(keyword, every)}")
    return groups


def _cross(groups: Mapping[str, Mapping[str, Any]], self_layers: int) -> dict[str, Any]:
    """Cross-attention's keywords: those of self-attention that make sense there, under its own.

    A value for each self-attention layer is theirs alone; without such layers, it is meant for cross-attention.
    """
    inherited = {}
    for keyword, value in groups["attn"].items():
        per_layer = isinstance(value, (tuple, list)) and not accepts(ATTENTION.hints[keyword], tuple(value))
        if not (per_layer and self_layers) and not ATTENTION.owner[keyword].self_attention_only:
            inherited[keyword] = value
    return {**inherited, **groups["cross"]}
