"""The list of sublayers that structure options lead to, and the order in which they run: pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from x_transformers.errors import ConfigError
from x_transformers.layers.kinds import CROSS_ATTENTION, KINDS, MIXER, BranchKind
from x_transformers.mixers.catalog import class_of
from x_transformers.options.schema import Options, Surroundings

Repeat = tuple[int | tuple[int, int], int]


class Step(NamedTuple):
    """One sublayer in the order of execution.

    Attributes:
        number: number of sublayers that run before it.
        layer: index of the built sublayer.
        kind: its kind.
        nth: number of sublayers of its kind that run before it.
        block: number of its block.
        begins: it is the first of its block.
        ends: it is the last of its block.
    """

    number: int
    layer: int
    kind: BranchKind
    nth: int
    block: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class LayerSequence:
    """The sublayers that are built, and the order in which they run.

    Attributes:
        kinds: the letter of each built sublayer's kind.
        order: indices of built sublayers, in the order of execution.
        block: number of sublayers in a block; 1 for lists that are not made of equal blocks.
        depth: number of blocks, as wrappers count them.
        custom: the list is not made of equal blocks.
    """

    kinds: tuple[str, ...]
    order: tuple[int, ...]
    block: int
    depth: int
    custom: bool

    @property
    def blocks(self) -> int:
        """Number of blocks that run."""
        return len(self.order) // self.block

    def steps(self, order: tuple[int, ...]) -> tuple[Step, ...]:
        """Return the steps of an order of execution."""
        steps, counts = [], dict.fromkeys(KINDS, 0)
        for number, index in enumerate(order):
            kind = self.kinds[index]
            block, inside = divmod(number, self.block)
            begins, ends = inside == 0, inside == self.block - 1
            steps.append(Step(number, index, KINDS[kind], counts[kind], block, begins, ends))
            counts[kind] += 1
        return tuple(steps)

    def count(self, kind: str, order: tuple[int, ...]) -> int:
        """Return the number of sublayers of a kind that run."""
        return sum(self.kinds[index] == kind for index in order)


def layer_sequence(options: Options) -> LayerSequence:
    """Return the sublayers of a stack and their order.

    Raises:
        ConfigError: if the options contradict each other.
    """
    structure, depth = options["structure"], options["structure"].depth
    explicit = options["custom_layers"].custom_layers
    _refuse_counts_of_attentions(options)
    if explicit is not None:
        if depth is not None:
            raise ConfigError("`custom_layers` says which layers there are; drop `depth`.")
        kinds = _custom(tuple(explicit), structure.cross_attend, structure.only_attn)
    elif depth is None:
        raise ConfigError("`depth` is missing: the number of blocks.")
    elif options["par"].par_ratio is not None:
        kinds = _par(options["par"].par_ratio, depth, default_block(options))
    elif options["sandwich_order"].sandwich_coef is not None:
        kinds = _sandwich(options["sandwich_order"].sandwich_coef, depth, default_block(options))
    else:
        kinds = None
    order = options["execute_order"].layers_execute_order
    if kinds is not None:
        kinds = _without_feedforwards(kinds) if structure.only_attn else kinds
        order = check_order(order, len(kinds))
        _check_chosen(options, kinds)
        return LayerSequence(kinds, order, 1, len(order), True)
    assert depth is not None
    if options.on("weight_tying"):
        return _tied(options, depth)
    period = _period(options)
    blocks = [_block(options, period[number % len(period)]) for number in range(depth)]
    kinds = tuple(kind for block in blocks for kind in block)
    if order is not None and structure.only_attn:
        raise ConfigError("`layers_execute_order` numbers sublayers with feedforwards; drop it or `only_attn`.")
    _check_chosen(options, kinds)
    return LayerSequence(kinds, check_order(order, len(kinds)), len(blocks[0]), depth, False)


def _tied(options: Options, depth: int) -> LayerSequence:
    """Return the sequence of tied blocks, which are built once, or each by itself if they are not tied as wholes."""
    block, count = default_block(options), _tied_blocks(options)
    if depth % count:
        raise ConfigError(f"`tie_blocks` is {count}, which does not divide the `depth` {depth}; choose a divisor.")
    if options.on("relaxed_recursion"):
        _check_chosen(options, block * depth)
        return LayerSequence(block * depth, tuple(range(depth * len(block))), len(block), depth, False)
    _check_chosen(options, block * count)
    run = [tied_to(options, number) for number in range(depth)]
    order = tuple(number * len(block) + part for number in run for part in range(len(block)))
    return LayerSequence(block * count, order, len(block), count, False)


def _tied_blocks(options: Options) -> int:
    """Return the number of different blocks."""
    return options["weight_tying"].tie_blocks or 1


def tied_to(options: Options, number: int) -> int:
    """Return which of the different blocks of a stack with tied ones runs at a place.

    Args:
        options: of the stack.
        number: of the place among the blocks that run, from 0.
    """
    count, depth = _tied_blocks(options), options["structure"].depth
    return number % count if options["weight_tying"].tie_order == "cycle" else number * count // depth


def runs_blocks_again(options: Options | Surroundings) -> bool:
    """Return True if built blocks run several times, because they are tied as wholes."""
    return options.on("weight_tying") and not options.on("relaxed_recursion")


def default_block(options: Options) -> tuple[str, ...]:
    """Return one block: "a f", with cross-attention "a c f" or "c f", with macaron another "f" before it.

    With `mixer`, it has an "m" instead of the "a".
    """
    return _block(options, "a" if options["mixer"].mixer is None else MIXER.letter)


def _block(options: Options, mixing: str) -> tuple[str, ...]:
    """Return one block whose tokens are mixed by the kind of a letter."""
    structure = options["structure"]
    block = (mixing, "f")
    if structure.cross_attend and CROSS_ATTENTION.letter not in _period(options):
        block = (mixing, CROSS_ATTENTION.letter, "f")
    block = block[1:] if structure.only_cross else block
    block = ("f", *block) if options["macaron"].macaron else block
    return _without_feedforwards(block) if structure.only_attn else block


def _period(options: Options) -> tuple[str, ...]:
    """Return the letters of what mixes tokens in each block of a period.

    Raises:
        ConfigError: if a letter is of another kind, or contradicts `cross_attend`.
    """
    structure, given = options["structure"], options["layer_period"].layer_period
    if given is None:
        return ("a" if options["mixer"].mixer is None else MIXER.letter,)
    letters, mixing = tuple(given), [letter for letter, kind in KINDS.items() if not kind.is_feedforward]
    if not letters or not set(letters) <= set(mixing):
        *some, last = mixing
        raise ConfigError(f"`layer_period` is {given!r}; it must hold the letters {', '.join(some)} and {last}.")
    if structure.only_cross:
        raise ConfigError(
            "`only_cross` leaves cross-attention and feedforwards only, but `layer_period` specifies other layers; "
            "keep one of them."
        )
    if CROSS_ATTENTION.letter in letters and not structure.cross_attend:
        raise ConfigError("`layer_period` with a c needs `cross_attend = True`.")
    return letters


def _refuse_counts_of_attentions(options: Options) -> None:
    """Raise a `ConfigError` for options that count attentions, in a stack with other layers."""
    if options["mixer"].mixer is None and options["layer_period"].layer_period is None:
        return
    for keyword, value in (
        ("sandwich_coef", options["sandwich_order"].sandwich_coef),
        ("par_ratio", options["par"].par_ratio),
    ):
        if value is not None:
            raise ConfigError(f"`{keyword}` counts attentions; write the order as `custom_layers` or `layer_period`.")


def _check_chosen(options: Options, kinds: tuple[str, ...]) -> None:
    """Raise a `ConfigError` unless there is a mixer for each layer that has one."""
    mixer, count = options["mixer"].mixer, kinds.count(MIXER.letter)
    if mixer is None and count:
        raise ConfigError("the list of layers holds m, but `mixer` does not say what it is.")
    if mixer is not None and not count:
        raise ConfigError("`mixer` is for `m` layers and the list has none; add an m, or drop `mixer`.")
    if isinstance(mixer, tuple) and len(mixer) != count:
        raise ConfigError(f"`mixer` names {len(mixer)} mixers, but there are {count} m layers.")
    for name in (mixer,) if isinstance(mixer, str) else mixer or ():
        class_of(name)


def _without_feedforwards(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(kind for kind in kinds if not KINDS[kind].is_feedforward)


def check_order(order: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """Return the order of execution, by default that of the list.

    Raises:
        ConfigError: if an index is out of range.
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
    """Return the order of execution with ranges of blocks repeated: `((0, 1), 2)` runs blocks 0 and 1 twice.

    Raises:
        ConfigError: if the list is not made of blocks, or the ranges overlap, are empty or end after the last block.
    """
    if sequence.custom:
        raise ConfigError("`repeat_blocks` needs a stack of equal blocks; this one has its own list of layers.")
    blocks = len(sequence.kinds) // sequence.block
    # the second part of a single `(range, times)` is a number, that of a list of two such pairs is a tuple
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
    if not codes or not set(codes) <= set(KINDS):
        *some, last = KINDS
        raise ConfigError(f"`custom_layers` is {codes}; it must hold the codes {', '.join(some)} and {last}.")
    if ("c" in codes) != cross_attend:
        raise ConfigError(
            "`custom_layers` with a c needs `cross_attend = True`, and `cross_attend` needs a c among `custom_layers`."
        )
    if only_attn and codes != _without_feedforwards(codes):
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
    # all attention goes into about the first two thirds of the stack, since later layers gain little from it
    attention = _without_feedforwards(block)
    groups, two_thirds = total // ratio, 2 * total // 3
    width = (two_thirds + two_thirds // groups) // groups
    if len(attention) > width:
        raise ConfigError(f"`par_ratio` is {ratio}: {len(attention)} attentions do not fit into groups of {width}.")
    head = (attention + ("f",) * (width - len(attention))) * groups
    return head + ("f",) * (total - len(head))
