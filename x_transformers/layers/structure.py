"""Which sublayers a stack has, in which order, and options of the stack as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class StructureOptions:
    depth: int | None = opt(None, "blocks")
    heads: int = opt(8, "query heads of every attention")
    cross_attend: bool = opt(False, "a cross-attention in each block; a forward pass then needs `context`")
    only_cross: bool = opt(False, "with `cross_attend`: no self-attention")

    def __post_init__(self) -> None:
        require(self.depth is None or self.depth >= 1, f"`depth` is {self.depth}; it must be at least 1.")
        require(self.heads >= 1, f"`heads` is {self.heads}; it must be at least 1.")
        require(
            self.cross_attend or not self.only_cross,
            "`only_cross` drops self-attention beside cross-attention; it needs `cross_attend = True`.",
        )


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    disable_abs_pos_emb: bool | None = opt(None, "no absolute positions in wrappers; default: with rotary or T5 bias")
    rel_pos_kwargs: dict[str, Any] = opt({}, "further arguments of the bias module (ALiBi: `slopes`)")
    verbose: bool = opt(True, "warn about options that have no effect or are unwise")


STRUCTURE = Feature(
    name="structure",
    group="stack",
    slot="structure",
    options=StructureOptions,
    summary="blocks of attention and feedforward",
    paper="1706.03762",
    examples=({"cross_attend": True},),
)

STACK = Feature(
    name="stack",
    group="stack",
    slot="stack",
    options=StackOptions,
    summary="options of the stack as a whole",
    refuses=(
        Rule(
            when=lambda o: (
                bool(o["stack"].rel_pos_kwargs) and not (o.on("alibi") or o.on("t5_bias") or o.on("dynamic_bias"))
            ),
            why="`rel_pos_kwargs` are arguments of a relative position bias; switch one on, or drop them.",
        ),
    ),
    examples=({"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [0.5, 0.25, 0.125, 0.1]}},),
)
