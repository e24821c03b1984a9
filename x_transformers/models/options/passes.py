"""Options of a whole pass: repetitions of the stack, and defaults of arguments."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import Rule, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class Recycling(Keywords):
    recycling: bool = opt(False, "run the stack several times, adding a map of its output to its input")
    train_max_recycle_steps: int = opt(
        4, "in training a pass draws the number of runs from 1 to this; evaluation uses it as default"
    )

    def __post_init__(self) -> None:
        at_least(1, train_max_recycle_steps=self.train_max_recycle_steps)


RECYCLING = model_feature(
    "recycling",
    Recycling,
    "the stack reads a map of its own output, as AlphaFold 2 does",
    enabled=lambda options: options.recycling,
)


@dataclass(frozen=True, kw_only=True)
class Looped(Keywords):
    looped: bool = opt(False, "run the stack on its own output, and learn after how many loops a token may leave")
    max_looped_steps: int = opt(4, "largest number of loops")

    def __post_init__(self) -> None:
        at_least(1, max_looped_steps=self.max_looped_steps)


LOOPED = model_feature(
    "looped",
    Looped,
    "the stack runs on its own output, for each token as often as it gains by it",
    enabled=lambda options: options.looped,
    refuses=(
        Rule(
            when=lambda options: options.on("recycling"),
            why="`looped` and `recycling` both run the stack several times; drop one of them.",
        ),
    ),
    paper="2510.25741",
)


@dataclass(frozen=True, kw_only=True)
class Exits(Keywords):
    exit_layers: tuple[int, ...] | None = opt(None, "blocks, counted from 1, after which the head predicts too")
    exit_norms: bool = opt(False, "each exit has a norm of its own, a copy of the final norm at first")

    def __post_init__(self) -> None:
        blocks = self.exit_layers
        ascending = blocks is None or (len(blocks) > 0 and all(a < b for a, b in itertools.pairwise((0, *blocks))))
        require(
            ascending, f"`exit_layers` is {blocks}; it must hold numbers of blocks, counted from 1, in ascending order."
        )


EXITS = model_feature(
    "exits",
    Exits,
    "the head predicts after earlier blocks, too",
    {"exit_layers": (1,)},
    {"exit_layers": (1, 2), "exit_norms": True},
    enabled=lambda options: options.exit_layers is not None,
    refuses=tuple(
        Rule(
            when=lambda options, other=other: options.on(other),
            why=f"`exit_layers` are of one run of the stack, and `{other}` runs it several times; drop one of them.",
        )
        for other in ("recycling", "looped")
    ),
    paper="2404.16710",
    exempt_examples={("export", 2): "the reference has no exits"},
)


@dataclass(frozen=True, kw_only=True)
class AttentionZLoss(Keywords):
    attn_z_loss_weight: float = opt(1e-4, "default of the argument of a pass")

    def __post_init__(self) -> None:
        weight = self.attn_z_loss_weight
        require(weight >= 0, f"`attn_z_loss_weight` is {weight}; it must not be negative.")


ATTENTION_Z_LOSS = model_feature(
    "attn_z_loss", AttentionZLoss, "a penalty on large logits of attention", paper="2202.08906"
)


@dataclass(frozen=True, kw_only=True)
class NewTokensOnly(Keywords):
    input_not_include_cache: bool = opt(False, "default of the argument of a pass")


NEW_TOKENS_ONLY = model_feature("new_tokens_only", NewTokensOnly, "cached passes are given the new tokens only")
