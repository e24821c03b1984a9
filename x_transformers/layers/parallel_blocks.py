"""Blocks that read one stream (2309.08414): the first-order form of a deep stack.

y = x + sum over l of (block_l(x) - x),    l the blocks of a group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from x_transformers.errors import ConfigError, InputError
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class ParallelBlocksOptions:
    parallel_blocks: int = opt(
        1, "this number of blocks reads one stream, to which they add what each of them changes; 1: one after the other"
    )

    def __post_init__(self) -> None:
        count = self.parallel_blocks
        require(count >= 1, f"`parallel_blocks` is {count}; it is a number of blocks, at least 1.")


def check_groups(order: Sequence[int], block: int, group: int) -> None:
    """Raise a `ConfigError` unless the blocks that run are whole groups.

    Args:
        order: indices of built sublayers, in the order of execution.
        block: number of sublayers of a block.
        group: number of blocks of a group.
    """
    blocks = len(order) // block
    if blocks % group:
        raise ConfigError(
            f"`parallel_blocks` is {group}, but {blocks} blocks are to run, which is no multiple of it; change one of "
            "the two."
        )


def check_end(block: int, group: int) -> None:
    """Raise an `InputError` unless a group of blocks ends with a block, counted from 1."""
    if block % group:
        raise InputError(
            f"an exit after block {block} was requested, but with `parallel_blocks` = {group} there is a stream only "
            f"after every {group} blocks; choose a multiple of {group}."
        )


_OTHERS = {
    "gate_residual": "gate_residual",
    "orthog_residual": "orthog_residual",
    "mv_split_residual": "mv_split_residual",
    "residual_streams": "num_residual_streams",
    "path_scales": "path_scales",
    "resi_dual": "resi_dual",
    "aggregated_residuals": "attn_aggregated_residuals",
    "lime": "integrate_layers",
    "unet_skips": "unet_skips",
}
"""Features that change what blocks read and write, and their keywords."""

FEATURE = Feature(
    name="parallel_blocks",
    group="stack",
    slot="structure",
    options=ParallelBlocksOptions,
    enabled=lambda options: options.parallel_blocks > 1,
    summary="groups of blocks that read one stream",
    paper="2309.08414",
    refuses=(
        Rule(
            when=lambda o: any(map(o.on, ("custom_layers", "sandwich_order", "par"))),
            why="`parallel_blocks` groups equal blocks; drop `custom_layers`, `sandwich_coef` and `par_ratio`.",
        ),
        Rule(
            when=lambda o: o["norm_placement"].after,
            why="`parallel_blocks` adds what blocks change to one stream, which norms between them would change; drop "
            "`pre_norm = False` and `pre_and_post_norm`.",
        ),
        *(
            Rule(
                when=lambda o, other=other: o.on(other),
                why=f"`parallel_blocks` decides what blocks read and how their outputs are added, and so does "
                f"`{keyword}`; drop one of them.",
            )
            for other, keyword in _OTHERS.items()
        ),
    ),
    exempt={"export": "the reference runs blocks one after the other"},
    examples=({"parallel_blocks": 2}, {"parallel_blocks": 2, "depth": 4, "use_rmsnorm": True}),
)
