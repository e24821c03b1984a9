"""Positions that are encoded differently from layer to layer: other frequencies, or none.

Local and global layers of one model may have different rotary bases (Gemma 3, arXiv 2503.19786); some layers of other
models have no positions (2501.18795).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from x_transformers.attention.base import QKTransform
from x_transformers.errors import StateDictError
from x_transformers.modules.state_dict import ReadsReference


class TransformsByLayer(ReadsReference, QKTransform):
    """Query/key transforms of the self-attentions of a stack.

    Layers whose transform is the same share one object, so that a pass computes its tables once.

    Args:
        transforms: the different ones.
        chosen: for each sublayer that has one, by its index, the number of its transform.
    """

    def __init__(self, transforms: Sequence[QKTransform], chosen: Mapping[int, int]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.chosen = dict(chosen)

    @property
    def refuses_tables(self) -> str:
        return "its layers encode positions differently"

    def of_layer(self, index: int) -> tuple[QKTransform, ...]:
        """Return the transform of one sublayer, or no transform.

        Args:
            index: of the sublayer in the stack.
        """
        number = self.chosen.get(index)
        return () if number is None else (self.transforms[number],)  # type: ignore[return-value]

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError(
            "the reference has no positions that differ between layers; a model with them cannot be exported."
        )
