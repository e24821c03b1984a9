"""Titans (2501.00663): a memory that learns by gradient descent while it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.mixers.base import shows_fields_of
from x_transformers.mixers.learning_memory import Learning, LearningMemory, Length, Place, Read
from x_transformers.options.schema import Feature, opt
from x_transformers.recurrences.base import CHUNK


@shows_fields_of(Learning)
class Titans(LearningMemory):
    """Memory of Titans: gradient descent with momentum and decay; see `LearningMemory` for the equations.

    Args:
        dim: width of the model.
        heads: number of heads.
        dim_key, dim_value: widths of a head; default `dim / heads`.
        qk_norm: "unit", "rms" or "none".
        gate: gate the output.
        norm_eps: of norms.
        chunk: tokens whose gradients are taken at once.
        learning: fields of `Learning`.
    """

    name = "titans"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        qk_norm: Length | None = None,
        gate: bool | None = None,
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
        **learning: Any,
    ) -> None:
        super().__init__(
            dim,
            Learning.of(Titans, learning),
            heads=heads,
            dim_key=dim_key,
            dim_value=dim_value,
            qk_norm=qk_norm,
            gate=gate,
            norm_eps=norm_eps,
            chunk=chunk,
        )


@dataclass(frozen=True, kw_only=True)
class TitansOptions:
    memory_depth: int | None = opt(None, "layers of a memory that learns: 1 or 2")
    memory_expand: float | None = opt(None, "hidden width of a memory of two layers, over that of its keys")
    memory_residual: bool | None = opt(None, "add the key to the normalized answer of a memory")
    memory_read: Read | None = opt(None, "whether tokens read a memory before or after they write to it")
    rate: Place | None = opt(None, "the learning rate of a memory inside or outside of its momentum")
    loss_scale: float | None = opt(None, "factor of the loss that a memory learns by")
    qk_norm: Length | None = opt(None, "norm of queries and keys of a memory")
    muon_steps: int | None = opt(None, "steps that make each update of a memory orthogonal; 0 for none")


FEATURE = Feature(
    name="titans",
    group="mixer",
    slot="mixer",
    options=TitansOptions,
    build=Titans,
    summary="memory that learns by gradient descent while it reads",
    paper="2501.00663",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "titans", "mixer_chunk": 4},
        {
            "mixer": "titans",
            "mixer_chunk": 4,
            "mixer_memory_depth": 2,
            "mixer_memory_residual": True,
            "mixer_heads": 2,
            "layer_period": "ma",
        },
        {
            "mixer": "titans",
            "mixer_chunk": 3,
            "mixer_rate": "outside",
            "mixer_memory_read": "before",
            "mixer_qk_norm": "unit",
            "mixer_dim_value": 3,
            "mixer_gate": True,
        },
    ),
)
