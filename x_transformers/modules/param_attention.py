"""Attention of tokens to parameters instead of a linear map (TokenFormer, 2410.23168)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import at_least_float32, unit_length
from x_transformers.options.schema import at_least, positive

ParamWeighting = Literal["l2_gelu", "gelu_l2", "softmax"]


def first_scale(kind: ParamWeighting, tokens: int) -> float:
    """Return the factor of the weights of a number m of parameter tokens: sqrt(m), or m with a softmax."""
    return float(tokens) if kind == "softmax" else tokens**0.5


class ParamWeights(LoadsWhole):
    """Weights of parameter tokens, from scores z over the last axis. Computed at least in float32.

        l2_gelu: gelu(c z / |z|)        gelu_l2: c gelu(z) / |gelu(z)|        softmax: c softmax(z)

    Scores of 0 have weights of 0, except with a softmax, so that further tokens whose keys are 0 change nothing.

    Args:
        kind: which of them.
        scale: the factor c. It stays when tokens are added.
    """

    def __init__(self, kind: ParamWeighting, scale: float) -> None:
        super().__init__()
        positive(scale=scale)
        self.kind, self.scale = kind, scale

    def forward(self, scores: Tensor) -> Tensor:
        """Return the weights of `(..., m)` scores."""
        z = at_least_float32(scores)
        if self.kind == "softmax":
            weights = z.softmax(dim=-1) * self.scale
        elif self.kind == "l2_gelu":
            weights = F.gelu(unit_length(z, self.scale))
        else:
            weights = unit_length(F.gelu(z), self.scale)
        return weights.to(scores.dtype)

    def extra_repr(self) -> str:
        """Return the arguments, for the representation of the module."""
        return f"{self.kind!r}, scale={self.scale:g}"


class ParamAttention(LoadsWhole):
    """Attention of tokens to m parameter tokens, `weights(K x) V`, instead of a linear map.

    Args:
        dim: width of the input.
        dim_out: width of the output.
        tokens: number m of parameter tokens.
        kind: how scores become weights, see `ParamWeights`.
        scale: factor of the weights; default sqrt(m), or m with a softmax.
    """

    def __init__(
        self, dim: int, dim_out: int, tokens: int, kind: ParamWeighting = "l2_gelu", scale: float | None = None
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, dim_out=dim_out, tokens=tokens)
        self.keys = nn.Linear(dim, tokens, bias=False)
        self.weights = ParamWeights(kind, first_scale(kind, tokens) if scale is None else scale)
        self.values = nn.Linear(tokens, dim_out, bias=False)
        init_param_tokens(self.keys, self.values)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim_out)`."""
        out: Tensor = self.values(self.weights(self.keys(x)))
        return out


def init_param_tokens(keys: nn.Linear, values: nn.Linear) -> None:
    """Initialize keys `(m, D)` with variance 1 / D, and values, one in each column of `(D', m)`, with 1 / m."""
    for linear in (keys, values):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
