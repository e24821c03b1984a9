"""From a call of keywords to a plan of layers: pure data, every fault at once, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.errors import Faults, did_you_mean
from x_transformers.layers.catalog import ATTENTION, FEEDFORWARD, STACK
from x_transformers.layers.planned import is_planned
from x_transformers.options.per_layer import distribute
from x_transformers.options.schema import Options, Surroundings, accepts

SUPPLIED = {
    "attn_heads": "`heads`",
    "attn_causal": "an Encoder or a Decoder",
    "attn_dim": "`dim`",
    "attn_dim_out": "`dim`",
    "ff_dim_out": "`dim`",
    "ff_dim": "`dim`",
}
"""Keywords of a sublayer that the stack itself sets, and by what."""


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
    structure = options["structure"]
    if given.get("depth") is None:
        faults.add("`depth` is missing: the number of blocks.")
    kinds = layer_kinds(structure)
    counts = {kind: kinds.count(kind) for kind in "acf"}
    if not counts["c"] and groups["cross"]:
        faults.add(f"`cross_attn_{next(iter(groups['cross']))}` needs `cross_attend = True`.")
    if "dim_context" in groups["attn"] and counts["a"]:
        faults.add("`attn_dim_context` belongs to cross-attention; write `cross_attn_dim_context`.")
    _check_layer_dropout(options["layer_dropout"].layer_dropout, len(kinds), faults)

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
        surroundings = Surroundings((options, layer.options) if layer.kind != "c" else (layer.options,))
        schema.check_rules(layer.options, surroundings, faults)
        if layer.kind == "a":
            STACK.check_rules(options, surroundings, faults)
        warnings += schema.without_effect(layer.options, layer.keywords, prefix)
    if not counts["a"]:
        STACK.check_rules(options, Surroundings((options,)), faults)
    faults.raise_if_any(name)
    return StackPlan(options, tuple(layers), tuple(dict.fromkeys(warnings)))


def layer_kinds(structure: Any) -> tuple[str, ...]:
    """The sublayers of a stack: blocks of "a f", "a c f" or "c f"."""
    block = ("a", "c", "f") if structure.cross_attend else ("a", "f")
    if structure.only_cross:
        block = block[1:]
    return block * (structure.depth or 0)


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
        if is_planned(keyword):
            faults.add(f"`{keyword}` is not available in this version; drop it.")
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


def _check_layer_dropout(value: Any, layers: int, faults: Faults) -> None:
    if isinstance(value, tuple) and len(value) != layers:
        faults.add(f"`layer_dropout` holds {len(value)} probabilities, but there are {layers} sublayers.")
