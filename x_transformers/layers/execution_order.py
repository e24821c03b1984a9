"""From structure options to the list of sublayers and the order in which they run: pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from x_transformers.errors import ConfigError
from x_transformers.options.schema import Options

Repeat = tuple[int | tuple[int, int], int]


class Step(NamedTuple):
    """One sublayer in the order of execution.

    Attributes:
        number: how many ran before it. layer: index of the built sublayer. kind: of it.
        nth: how many of its kind ran before it.
        block: number of its block. begins, ends: it is the first, the last of its block.
    """

    number: int
    layer: int
    kind: str
    nth: int
    block: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class LayerSequence:
    """Which sublayers are built, and how they run.

    Attributes:
        kinds: "a", "c" or "f" for each built sublayer.
        order: indices of built sublayers, in the order of execution.
        block: sublayers of one block; 1 for lists that are no blocks.
        depth: blocks, as wrappers count them.
        custom: the list is not made of equal blocks.
    """

    kinds: tuple[str, ...]
    order: tuple[int, ...]
    block: int
    depth: int
    custom: bool

    def steps(self, order: tuple[int, ...]) -> tuple[Step, ...]:
        """What runs in an order of execution."""
        steps, counts = [], dict.fromkeys("acf", 0)
        for number, index in enumerate(order):
            kind = self.kinds[index]
            block, inside = divmod(number, self.block)
            steps.append(Step(number, index, kind, counts[kind], block, inside == 0, inside == self.block - 1))
            counts[kind] += 1
        return tuple(steps)

    def count(self, kind: str, order: tuple[int, ...]) -> int:
        """How many sublayers of a kind run."""
        return sum(self.kinds[index] == kind for index in order)


def layer_sequence(options: Options) -> LayerSequence:
    """The sublayers of a stack.

    Raises:
        ConfigError: if the options do not lead to a list.
    """
    structure, depth = options["structure"], options["structure"].depth
    block = default_block(options)
    explicit = options["custom_layers"].custom_layers
    if explicit is not None:
        if depth is not None:
            raise ConfigError("`custom_layers` says which layers there are; drop `depth`.")
        kinds = _custom(tuple(explicit), structure.cross_attend, structure.only_attn)
    elif depth is None:
        raise ConfigError("`depth` is missing: the number of blocks.")
    elif options["par"].par_ratio is not None:
        kinds = _par(options["par"].par_ratio, depth, block)
    elif options["sandwich_order"].sandwich_coef is not None:
        kinds = _sandwich(options["sandwich_order"].sandwich_coef, depth, block)
    else:
        kinds = None
    order = options["execute_order"].layers_execute_order
    if kinds is not None:
        kinds = tuple(kind for kind in kinds if kind != "f" or not structure.only_attn)
        order = check_order(order, len(kinds))
        return LayerSequence(kinds, order, 1, len(order), True)
    assert depth is not None
    if options["weight_tying"].weight_tie_layers:
        return LayerSequence(block, tuple(range(len(block))) * depth, len(block), 1, False)
    kinds = block * depth
    if order is not None and structure.only_attn:
        raise ConfigError("`layers_execute_order` numbers sublayers with feedforwards; drop it or `only_attn`.")
    return LayerSequence(kinds, check_order(order, len(kinds)), len(block), depth, False)


def default_block(options: Options) -> tuple[str, ...]:
    """One block: "a f", with cross-attention "a c f" or "c f", macaron with another "f" in front."""
    structure = options["structure"]
    block = ("a", "c", "f") if structure.cross_attend else ("a", "f")
    block = block[1:] if structure.only_cross else block
    block = ("f", *block) if options["macaron"].macaron else block
    return tuple(kind for kind in block if kind != "f" or not structure.only_attn)


def check_order(order: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """The order of execution, by default that of the list.

    Raises:
        ConfigError: if an index is not that of a sublayer.
    """
    if order is None:
        return tuple(range(layers))
    if not order or not all(0 <= index < layers for index in order):
        raise ConfigError(
            f"`layers_execute_order` is {tuple(order)}; it must hold indices between 0 and {layers - 1}, of the "
            f"{layers} sublayers."
        )
    return tuple(order)


def repeated(repeats: Sequence[Repeat] | Repeat, sequence: LayerSequence) -> tuple[int, ...]:
    """The order of execution when ranges of blocks repeat: `((0, 1), 2)` runs blocks 0 and 1 twice.

    Raises:
        ConfigError: if the list is not made of blocks, or the ranges overlap, are empty or end behind the last block.
    """
    if sequence.custom:
        raise ConfigError("`repeat_blocks` needs a stack of equal blocks; this one has a list of its own.")
    blocks = len(sequence.kinds) // sequence.block
    specs: Any = [repeats] if len(repeats) == 2 and isinstance(repeats[1], int) else list(repeats)
    ranges: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for span, times in specs:
        first, last = (span, span) if isinstance(span, int) else span
        inside = set(range(first, last + 1))
        if not inside or first < 0 or last >= blocks or times < 1 or inside & taken:
            raise ConfigError(
                f"`repeat_blocks` has the entry {(span, times)}; ranges must lie within the {blocks} blocks, not "
                "overlap and run at least once."
            )
        taken |= inside
        ranges[first] = (last, times)
    order: list[int] = []
    at = 0
    while at < blocks:
        last, times = ranges.get(at, (at, 1))
        order += list(range(at, last + 1)) * times
        at = last + 1
    return tuple(index * sequence.block + part for index in order for part in range(sequence.block))


def _custom(codes: tuple[str, ...], cross_attend: bool, only_attn: bool) -> tuple[str, ...]:
    if not codes or not set(codes) <= set("acf"):
        raise ConfigError(f"`custom_layers` is {codes}; it must hold the codes a, c and f.")
    if ("c" in codes) != cross_attend:
        raise ConfigError(
            "`custom_layers` with a c needs `cross_attend = True`, and `cross_attend` needs a c among `custom_layers`."
        )
    if only_attn and "f" in codes:
        raise ConfigError("`custom_layers` holds feedforwards; drop them or `only_attn`.")
    return codes


def _sandwich(k: int, depth: int, block: tuple[str, ...]) -> tuple[str, ...]:
    if not 0 < k <= depth:
        raise ConfigError(f"`sandwich_coef` is {k}; it must lie between 1 and `depth` = {depth}.")
    return ("a",) * k + block * (depth - k) + ("f",) * k


def _par(ratio: int, depth: int, block: tuple[str, ...]) -> tuple[str, ...]:
    total = depth * len(block)
    if not 1 < ratio <= total:
        raise ConfigError(f"`par_ratio` is {ratio}; it must lie between 2 and the {total} sublayers.")
    attention = tuple(kind for kind in block if kind != "f")
    groups, two_thirds = total // ratio, 2 * total // 3
    width = (two_thirds + two_thirds // groups) // groups
    if len(attention) > width:
        raise ConfigError(f"`par_ratio` is {ratio}: {len(attention)} attentions do not fit into groups of {width}.")
    head = (attention + ("f",) * (width - len(attention))) * groups
    return head + ("f",) * (total - len(head))
