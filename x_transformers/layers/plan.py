"""From the keywords of a call to a plan of layers: pure data, and every fault at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.errors import Faults
from x_transformers.layers.catalog import STACK
from x_transformers.layers.execution_order import LayerSequence, layer_sequence
from x_transformers.layers.kinds import KINDS, BranchKind
from x_transformers.options.per_layer import distribute
from x_transformers.options.schema import Options, Surroundings, default_of
from x_transformers.options.values import accepts, plain, shown, why_not

Keywords = dict[str, Any]


@dataclass(frozen=True)
class LayerPlan:
    """One built sublayer: its kind, its keywords without prefix, and the options that they mean."""

    kind: BranchKind
    keywords: Mapping[str, Any]
    options: Options


@dataclass(frozen=True)
class StackPlan:
    """A stack: its own options, its sublayers in order, and warnings for the user."""

    options: Options
    layers: tuple[LayerPlan, ...]
    sequence: LayerSequence
    warnings: tuple[str, ...]

    def of(self, letter: str) -> list[LayerPlan]:
        """Return the sublayers of one kind."""
        return [layer for layer in self.layers if layer.kind.letter == letter]


def make_plan(name: str, given: Mapping[str, Any]) -> StackPlan:
    """Sort keywords, distribute per-layer values, and check every layer.

    Args:
        name: the class that is built, for messages.
        given: the keywords of its constructor.

    Raises:
        ConfigError: listing all faults of the call.
    """
    faults = Faults()
    own, groups = _route(given, faults)
    options = STACK.parse(own, faults)
    # an empty list of layers, with which the checks below go on if the structure is wrong: all faults are reported at
    # once
    sequence = LayerSequence((), (), 1, 0, True)
    with faults.catching():
        sequence = layer_sequence(options)
    counts = Counter(sequence.kinds)
    _check_values(groups, counts, faults)
    idle = _check_counts(options, groups, counts, len(sequence.kinds), faults)
    keywords = {
        letter: distribute(
            _with_inherited(kind, groups, counts), counts[letter], kind.schema, faults, kind.prefix, kind.words
        )
        for letter, kind in KINDS.items()
    }
    chosen = {letter: _chosen(kind, options, counts[letter]) for letter, kind in KINDS.items()}
    layers = []
    for letter in sequence.kinds:
        kind = KINDS[letter]
        # layers of one kind take their per-layer values in the order in which they are built
        mine = keywords[letter].pop(0) if keywords[letter] else {}
        if kind.chosen_by is not None:
            mine = {**mine, kind.chosen_by: chosen[letter].pop(0)}
        parsed = kind.schema.parse(mine, faults, kind.prefix)
        kind.schema.check_choices(parsed, faults, kind.prefix)
        layers.append(LayerPlan(kind, mine, parsed))
    STACK.check_choices(options, faults)
    warnings = [*idle, *STACK.without_effect(options, own), *_check_rules(options, layers, faults)]
    faults.raise_if_any(name)
    return StackPlan(options, tuple(layers), sequence, tuple(dict.fromkeys(warnings)))


def _route(given: Mapping[str, Any], faults: Faults) -> tuple[Keywords, dict[str, Keywords]]:
    """Split keywords into the stack's own and those of each kind of sublayer, without prefix."""
    own: Keywords = {}
    groups: dict[str, Keywords] = {letter: {} for letter in KINDS}
    for keyword, value in given.items():
        # the stack's own come first, since some of them begin with the prefix of a kind
        kind = None if keyword in STACK.owner else _kind_of_keyword(keyword)
        if keyword in STACK.owner:
            own[keyword] = value
        elif kind is None:
            every = [*STACK.owner, *(kind.prefix + name for kind in KINDS.values() for name in kind.schema.owner)]
            faults.add_unknown(keyword, every)
        elif (name := keyword.removeprefix(kind.prefix)) in kind.set_by_stack:
            faults.add(f"`{keyword}` is set by the stack; use {kind.set_by_stack[name]}.")
        elif name not in kind.meaningless:
            groups[kind.letter][name] = value
        elif not (value is None or value is False):
            faults.add(f"`{keyword}` {kind.meaningless[name]}; drop it.")
    return own, groups


def _kind_of_keyword(keyword: str) -> BranchKind | None:
    """Return the kind of sublayer that a keyword with prefix belongs to, or None if it is unknown."""
    for kind in KINDS.values():
        name = keyword.removeprefix(kind.prefix)
        known = name in kind.schema.owner or name in kind.set_by_stack or name in kind.meaningless
        if keyword.startswith(kind.prefix) and known:
            return kind
    return None


def _with_inherited(kind: BranchKind, groups: Mapping[str, Keywords], counts: Mapping[str, int]) -> Keywords:
    """Return the keywords of one kind, with those that it inherits from another one.

    One value for each layer of the other kind belongs to those layers only. If there are no such layers, the values are
    meant for this kind.
    """
    inherited = {}
    for keyword, value in groups[kind.inherits].items() if kind.inherits is not None else ():
        # a tuple that is a valid value by itself is not a list with one value for each layer
        per_layer = isinstance(value, (tuple, list)) and not accepts(kind.schema.hints[keyword], tuple(value))
        if not (per_layer and counts[str(kind.inherits)]) and not kind.schema.owner[keyword].self_attention_only:
            inherited[keyword] = value
    return {**inherited, **groups[kind.letter]}


def _chosen(kind: BranchKind, options: Options, count: int) -> list[str]:
    """Return the names of the functions of a kind's layers, if the stack says which they are."""
    if kind.chosen_by is None:
        return []
    given = getattr(options[kind.chosen_by], kind.chosen_by)
    return list(given) if isinstance(given, tuple) else [given] * count


def _check_values(groups: Mapping[str, Keywords], counts: Mapping[str, int], faults: Faults) -> None:
    """Add the faults of values for kinds of layers that are not there, which no layer would check."""
    for letter, given in groups.items():
        kind = KINDS[letter]
        for name, value in given.items() if not counts[letter] else ():
            values = value if isinstance(value, (tuple, list)) and value else (value,)
            hint = kind.schema.hints[name]
            if not accepts(hint, plain(value)) and not all(accepts(hint, plain(each)) for each in values):
                wanted = why_not(kind.schema.fields[name].type, value)
                faults.add(f"`{kind.prefix}{name}` is {shown(value)}; {wanted}")


def _check_counts(
    options: Options, groups: Mapping[str, Keywords], counts: Mapping[str, int], layers: int, faults: Faults
) -> list[str]:
    """Add the faults of lists that are too short and of misplaced keywords, and return warnings about keywords for
    layers that are not there.
    """
    idle = []
    if layers and options["structure"].cross_attend and not any(KINDS[letter].is_cross_attention for letter in counts):
        faults.add("`cross_attend` reads a context, but no cross-attention is among the layers; change their list.")
    for letter, kind in KINDS.items():
        # without a list of layers there is a fault already
        if layers and kind.enabled_by is not None and not counts[letter]:
            idle += [
                f"`{kind.prefix}{name}` has no effect: there is no {kind.words}; it needs {kind.enabled_by}."
                for name, value in groups[letter].items()
                if isinstance(value, (tuple, list))
                or (accepts(kind.schema.hints[name], value) and value != default_of(kind.schema.fields[name]))
            ]
        for name, instead in kind.misplaced.items():
            if name in groups[letter] and counts[letter]:
                faults.add(f"`{kind.prefix}{name}` {instead}.")
    for keyword, value in (
        ("layer_dropout", options["layer_dropout"].layer_dropout),
        ("shift_tokens", options["shift_tokens"].shift_tokens),
    ):
        if not isinstance(value, tuple) or not layers or len(value) == layers:
            continue
        sentence = f"`{keyword}` holds {len(value)} values, but there are {layers} sublayers"
        if len(value) < layers:
            faults.add(f"{sentence}; pass one value, or a value for each.")
        else:
            idle.append(f"{sentence}; the last {len(value) - layers} have no effect.")
    return idle


def _without_effect(layers: list[LayerPlan]) -> list[str]:
    """Return a sentence for each keyword that no layer of its kind reads.

    Layers may run different functions, so that a keyword that all of them are given is meant for some.
    """
    unread: dict[tuple[str, str], str] = {}
    read: set[tuple[str, str]] = set()
    for layer in layers:
        schema = layer.kind.schema
        for name in layer.keywords:
            found = schema.without_effect(layer.options, [name], layer.kind.prefix)
            if found:
                unread[layer.kind.letter, name] = found[0]
            elif name in schema.owner and getattr(layer.options[schema.owner[name].name], name) != default_of(
                schema.fields[name]
            ):
                read.add((layer.kind.letter, name))
    return [sentence for keyword, sentence in unread.items() if keyword not in read]


def _check_rules(options: Options, layers: list[LayerPlan], faults: Faults) -> list[str]:
    """Check the rules of every layer in its surroundings, and return the warnings."""
    warnings: list[str] = []
    for layer in layers:
        kind, schema = layer.kind, layer.kind.schema
        # the parts of a stack (positions, views ...) act inside self-attention; a context has nothing to do with them
        groups = (layer.options,) if kind.is_cross_attention else (options, layer.options)
        around = Surroundings(groups, kind.is_self_attention, kind.is_cross_attention)
        schema.check_rules(layer.options, around, faults, kind.prefix)
        if kind.is_self_attention:
            STACK.check_rules(options, around, faults)
        warnings += schema.unwise(layer.options, around)
    warnings += _without_effect(layers)
    surroundings = Surroundings((options,))
    if not any(layer.kind.is_self_attention for layer in layers):
        STACK.check_rules(options, surroundings, faults)
    return [*warnings, *STACK.unwise(options, surroundings)]
