"""Attention over layers: each sublayer attends, token by token, to the inputs of all layers so far
(2601.21582, 2603.15031).

`x <- sum_l p_l x_l` with `p = softmax_l(<q, k_l> / sqrt(D))`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, UnknownKeywordError
from x_transformers.layers.depth.base import DepthReader
from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class AggregatedOptions:
    attn_aggregated_residuals: bool = opt(False, "sublayers attend to the inputs of all layers so far")
    attn_aggregated_residual_kwargs: dict[str, Any] = opt(
        {}, "`lora_rank` (default 64) and `lora_activation` (default none) of the low-rank map to queries"
    )

    def __post_init__(self) -> None:
        unknown = set(self.attn_aggregated_residual_kwargs) - {"lora_rank", "lora_activation"}
        if unknown:
            raise UnknownKeywordError(
                f"`attn_aggregated_residual_kwargs` names {sorted(unknown)}; it takes `lora_rank` and "
                "`lora_activation`."
            )


class AttentionResidual(ReadsReference, DepthReader):
    """Attention of each token over its own inputs at all layers so far: `sum_l p_l x_l`.

    `p = softmax_l(<q, k_l> / sqrt(D))` with `k_l = rms(x_l)` and `q = rms(x + B act(A rms(x)))`. `B` is zero at first,
    so that queries start as the normalized input.

    Args:
        dim: model width D.
        num_views: number of outputs: 3 if queries, keys and values each read their own mix, else 1.
        lora_rank: rank of the map to queries, the width between A and B; below `dim`.
        lora_activation: activation between A and B; default none.

    Raises:
        ConfigError: if the rank is not between 1 and `dim - 1`.
    """

    def __init__(
        self,
        dim: int,
        num_views: int = 1,
        lora_rank: int = 64,
        lora_activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, num_views=num_views, lora_rank=lora_rank)
        if not 1 <= lora_rank < dim:
            raise ConfigError(
                f"`lora_rank` is {lora_rank}; it must lie between 1 and {dim - 1}, below the width. Set it in "
                "`attn_aggregated_residual_kwargs`."
            )
        self.views, self.activation = num_views, lora_activation
        self.key_norm, self.input_norm, self.query_norm = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.down = nn.Linear(dim, lora_rank, bias=False)
        self.up = nn.Linear(lora_rank, num_views * dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor | None = None, hiddens: Sequence[Tensor] = ()) -> Tensor:
        """Return the mix of earlier inputs.

        Args:
            x: `(b, n, D)` input that queries are computed from; default the last of `hiddens`.
            hiddens: inputs of the layers so far, each `(b, n, D)`.

        Returns:
            `(b, n, D)`, or `(3, b, n, D)` with three views.

        Raises:
            InputError: if `hiddens` is empty.
        """
        if len(hiddens) == 0:
            raise InputError("`hiddens` is empty; pass the inputs of the layers so far, that of this layer last.")
        x = hiddens[-1] if x is None else x
        dim = x.shape[-1]
        hidden = self.down(self.input_norm(x))
        hidden = hidden if self.activation is None else self.activation(hidden)
        queries = self.query_norm(x.unsqueeze(-2) + self.up(hidden).unflatten(-1, (self.views, dim)))
        past = torch.stack(tuple(hiddens))
        logits = torch.einsum("bnvd,lbnd->vlbn", queries, self.key_norm(past)) * dim**-0.5
        mixed = torch.einsum("vlbn,lbnd->vbnd", logits.softmax(dim=1), past)
        return mixed[0] if self.views == 1 else mixed

    def reference_names(self) -> Mapping[str, str]:
        return {
            "to_keys.weight": "key_norm.weight",
            "to_query.0.weight": "input_norm.weight",
            "norm.weight": "query_norm.weight",
            "to_query.1.down.weight": "down.weight",
            "to_query.1.up.weight": "up.weight",
        }


def build(options: AggregatedOptions, sublayer: SublayerContext) -> AttentionResidual:
    """Build the depth reader of one sublayer."""
    views = 3 if sublayer.kind.is_self_attention and sublayer.options.on("qkv_views") else 1
    return AttentionResidual(sublayer.dim, views, **options.attn_aggregated_residual_kwargs)


FEATURE = Feature(
    name="aggregated_residuals",
    group="stack",
    slot="reader",
    choice="reading earlier layers",
    options=AggregatedOptions,
    enabled=lambda options: options.attn_aggregated_residuals,
    build=build,
    summary="sublayers attend to the inputs of all layers so far",
    paper="2603.15031",
    refuses=tuple(
        Rule(
            when=lambda o, other=other: o.on(other) and (other != "residual_streams" or o[other].gated_multi_residual),
            why=f"`attn_aggregated_residuals` and `{keyword}` are alternatives of one choice (residual connection); "
            "keep one of them.",
        )
        for other, keyword in (
            ("gate_residual", "gate_residual"),
            ("orthog_residual", "orthog_residual"),
            ("mv_split_residual", "mv_split_residual"),
            ("resi_dual", "resi_dual"),
            ("path_scales", "path_scales"),
            ("residual_streams", "gated_multi_residual"),
        )
    ),
    warns=(
        Rule(
            when=lambda o: o["residual_scale"].output_scale != 1 or o["depth_scale"].depth_scale_residual is not False,
            why="`depth_scale_residual`, and the factor of a numeric `scale_residual` on outputs, have no effect with "
            "`attn_aggregated_residuals`.",
        ),
    ),
    examples=(
        {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 4}},
        {
            "attn_aggregated_residuals": True,
            "attn_aggregated_residual_kwargs": {"lora_rank": 4},
            "qkv_receive_diff_residuals": True,
        },
    ),
    exempt={"gradients": r"layers\.0\.reader\.: a softmax over the one layer so far is constant"},
)
