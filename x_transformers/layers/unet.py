"""Skip connections from the first half of the layers to the second (2209.12152)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.layers.execution_order import LayerSequence, runs_blocks_again
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import Feature, Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    unet_skips: bool = opt(
        False, "combine the stream in the second half with the input of the mirror-image block of the first half"
    )


class ConcatCombine(LoadsWhole):
    """Skip connection that combines the stream with an earlier one: `W [skip ; x]`.

    Args:
        dim: model width D.
        prev_layer_ind: index of the skip among the earlier streams.
    """

    def __init__(self, dim: int, prev_layer_ind: int) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.prev_layer_ind = prev_layer_ind
        self.combine = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, prev_layers: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """Combine the stream with the skip.

        Args:
            x: `(..., D)` stream.
            prev_layers: earlier streams, each `(..., D)`, by their place in the order of execution.

        Returns:
            `(..., D)`.
        """
        return self.combine(torch.cat((prev_layers[self.prev_layer_ind], x), dim=-1))


def skip_sources(sequence: LayerSequence) -> dict[int, int]:
    """Return, for each built sublayer with a skip, the place in the order of execution whose input it reads.

    In a stack of B blocks, block `ceil(B/2) + k` reads the input of block `floor(B/2) - 1 - k`; if B is odd, the middle
    block has no skip.

    Raises:
        ConfigError: if there are fewer than two blocks, or a sublayer would run before its source.
    """
    blocks = len(sequence.kinds) // sequence.block
    if blocks < 2:
        raise ConfigError(
            f"`unet_skips` joins a first and a second half, but there is {blocks} block; set `depth` to at least 2."
        )
    half, upper = blocks // 2, -(-blocks // 2)
    sources = {(upper + k) * sequence.block: (half - 1 - k) * sequence.block for k in range(half)}
    check_sources(sequence.order, sources)
    return sources


def check_sources(order: Sequence[int], sources: Mapping[int, int]) -> None:
    """Raise a `ConfigError` if a sublayer would run before the place whose input it reads."""
    for place, index in enumerate(order):
        if sources.get(index, -1) >= place:
            raise ConfigError(
                f"with `unet_skips`, sublayer {index} reads the input of place {sources[index]} of the order of "
                f"execution, but runs itself at place {place} of {tuple(order)}; run it later."
            )


FEATURE = Feature(
    name="unet_skips",
    group="stack",
    slot="skips",
    options=UNetOptions,
    enabled=lambda options: options.unet_skips,
    summary="skip connections from the first half of the layers to the second",
    paper="2209.12152",
    refuses=(
        Rule(
            when=runs_blocks_again,
            why="`unet_skips` joins different blocks, but `weight_tie_layers` and `tie_blocks` run the same ones "
            "again; drop one of them.",
        ),
        Rule(
            when=lambda o: o["structure"].only_attn,
            why="`unet_skips` joins blocks of attention and feedforward, but `only_attn` builds no feedforwards; "
            "drop one of them.",
        ),
    ),
    examples=({"unet_skips": True}, {"unet_skips": True, "depth": 3}),
)
