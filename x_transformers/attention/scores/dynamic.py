"""Dynamic position bias: an MLP maps the distance to a bias for each head (arXiv 2108.00154).

The logarithmic distance is from arXiv 2111.09883.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import BoundScore
from x_transformers.attention.scores.base import DistanceBias, build_bias
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import Span
from x_transformers.options.schema import Feature, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class DynamicOptions:
    dynamic_pos_bias: bool = opt(False, "add a bias that an MLP computes from the distance")
    dynamic_pos_bias_log_distance: bool = opt(False, "use sign(d) * ln(|d| + 1) as input instead of the distance d")
    dynamic_pos_bias_mlp_depth: int = opt(2, "number of hidden layers of the MLP")
    dynamic_pos_bias_norm: bool = opt(False, "LayerNorm before each activation of the MLP")

    def __post_init__(self) -> None:
        depth = self.dynamic_pos_bias_mlp_depth
        require(depth >= 1, f"`dynamic_pos_bias_mlp_depth` is {depth}; the MLP needs at least 1 hidden layer.")


class GainOnlyLayerNorm(nn.Module):
    """LayerNorm over the last axis with a gain but no bias: `(x - mean) / std * gamma`.

    Args:
        dim: width of the axis.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma)


class DynamicPositionBias(DistanceBias):
    """Bias computed by an MLP from the distance: `bias[:, i, j] = MLP(i - j)`, with SiLU between the layers.

    Args:
        dim: width of the hidden layers.
        heads: number of heads, the outputs of the MLP.
        depth: number of hidden layers.
        log_distance: use `sign(d) * ln(|d| + 1)` as input instead of the distance d.
        norm: normalize before each activation.

    Raises:
        ConfigError: if `depth` is below 1.
    """

    def __init__(self, dim: int, *, heads: int, depth: int, log_distance: bool = False, norm: bool = False) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads, depth=depth)
        if depth < 1:
            raise ConfigError(f"`dynamic_pos_bias_mlp_depth` is {depth}; the MLP needs at least 1 hidden layer.")
        self.log_distance = log_distance
        layers: list[nn.Module] = []
        for level in range(depth):
            normalize: list[nn.Module] = []
            if norm:
                normalize.append(GainOnlyLayerNorm(dim) if level == 0 else nn.LayerNorm(dim))
            layers.append(nn.Sequential(nn.Linear(1 if level == 0 else dim, dim), *normalize, nn.SiLU()))
        layers.append(nn.Linear(dim, heads))
        self.mlp = nn.Sequential(*layers)

    def bias(self, distance: Tensor) -> Tensor:
        return self._mlp(distance).movedim(-1, -3)

    def bind(self, query: Span, keys: Span) -> BoundScore:
        bound = super().bind(query, keys)
        if query.contiguous and keys.contiguous and query.length > 0:
            bound.make_dense = lambda: self._toeplitz(query, keys)
        return bound

    def _toeplitz(self, query: Span, keys: Span) -> Tensor:
        """Return the closed form for consecutive positions: the MLP runs once per distance, not once per pair."""
        i, j = query.length, keys.length
        least = query.pos[0, 0] - keys.pos[0, 0] - (j - 1)
        table = self._mlp(least + torch.arange(i + j - 1, device=query.pos.device))
        # query q and key k are at the distance `least + (q - k + j - 1)`: from 0 for the first query and the last key
        # to i + j - 2 for the last query and the first key
        rows, columns = torch.arange(i, device=table.device), torch.arange(j, device=table.device)
        return table[rows[:, None] - columns + (j - 1)].movedim(-1, -3).unsqueeze(0)

    def _mlp(self, distance: Tensor) -> Tensor:
        t = distance.float()
        if self.log_distance:
            t = t.sign() * (t.abs() + 1).log()
        return self.mlp(t.to(next(self.parameters()).dtype).unsqueeze(-1))

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        last = f"{prefix}mlp.{len(self.mlp) - 1}"
        for name in ("weight", "bias"):
            state[f"{last}.{name}"] = state[f"{last}.{name}"][order]


def build(options: DynamicOptions, *, dim: int, heads: int, kwargs: dict[str, Any], **_: Any) -> DynamicPositionBias:
    """Build the bias of a stack of width `dim`."""
    return build_bias(
        DynamicPositionBias,
        kwargs,
        dim=dim // 4,
        heads=heads,
        depth=options.dynamic_pos_bias_mlp_depth,
        log_distance=options.dynamic_pos_bias_log_distance,
        norm=options.dynamic_pos_bias_norm,
    )


FEATURE = Feature(
    name="dynamic_bias",
    group="stack",
    slot="score",
    choice="relative position bias",
    options=DynamicOptions,
    enabled=lambda options: options.dynamic_pos_bias,
    build=build,
    summary="bias that an MLP computes from the distance",
    paper="2108.00154",
    examples=(
        {"dynamic_pos_bias": True},
        {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True, "dynamic_pos_bias_norm": True},
    ),
    exempt={"gradients": r"mlp\.\d+\.bias$: the last bias is the same for every key, and softmax ignores it"},
)
