"""ATLAS (2505.23735): a memory whose steps are those of a window of tokens, and orthogonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.mixers.base import shows_fields_of
from x_transformers.mixers.learning_memory import Learning, LearningMemory, Length, Place
from x_transformers.options.schema import Feature, at_least, opt
from x_transformers.recurrences.base import CHUNK


@dataclass(frozen=True, kw_only=True)
class OmegaLearning(Learning):
    """How a memory of ATLAS is made, and how it learns.

    Args:
        memory_depth, memory_expand, memory_residual, memory_read, rate, loss_scale, muon_steps: see `Learning`.
        omega_window: tokens whose gradients, with learned weights, each step adds up.
        feature_degree: keys and queries are `k + k^2 + ...` up to this power.
    """

    rate: Place = "outside"
    muon_steps: int = 5
    omega_window: int = 8  # type: ignore[misc]
    feature_degree: int = 2  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, omega_window=self.omega_window, feature_degree=self.feature_degree)


@shows_fields_of(OmegaLearning)
class Atlas(LearningMemory):
    """Memory of ATLAS: each step is that of a window of tokens, on polynomials of keys, and orthogonal.

    See `LearningMemory` for the equations; the gradient is `sum_{r > t - c} gamma_r grad_r`, with
    `gamma = sigmoid(to_window x)`, and a step adds `NS(Z_t)` instead of `Z_t`.

    Args:
        dim: width of the model.
        heads: number of heads.
        dim_key, dim_value: widths of a head; default `dim / heads`.
        qk_norm: "unit", "rms" or "none".
        gate: gate the output.
        norm_eps: of norms.
        chunk: tokens whose gradients are taken at once.
        learning: fields of `OmegaLearning`.
    """

    name = "atlas"

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
            OmegaLearning.of(Atlas, learning),
            heads=heads,
            dim_key=dim_key,
            dim_value=dim_value,
            qk_norm=qk_norm,
            gate=gate,
            norm_eps=norm_eps,
            chunk=chunk,
        )


@dataclass(frozen=True, kw_only=True)
class AtlasOptions:
    omega_window: int | None = opt(None, "tokens whose gradients each step of an atlas adds up")
    feature_degree: int | None = opt(None, "keys and queries of an atlas are polynomials of this degree")


FEATURE = Feature(
    name="atlas",
    group="mixer",
    slot="mixer",
    options=AtlasOptions,
    build=Atlas,
    summary="memory whose steps are those of a window of tokens, and orthogonal",
    paper="2505.23735",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "atlas", "mixer_chunk": 4, "mixer_omega_window": 3, "mixer_muon_steps": 2},
        {
            "mixer": "atlas",
            "mixer_chunk": 4,
            "mixer_memory_depth": 2,
            "mixer_omega_window": 6,
            "mixer_feature_degree": 3,
            "mixer_muon_steps": 0,
            "mixer_heads": 2,
            "layer_period": "ma",
        },
    ),
)
