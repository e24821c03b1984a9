"""Graph-aware attention: heads aggregate slices of the input as in a graph isomorphism network (arXiv 2501.02393)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import (
    AttentionShape,
    MakeHeads,
    QKNorm,
    RowContext,
    RowMod,
    Stage,
    ValueContext,
    ValueMod,
    WeightChange,
)
from x_transformers.errors import ConfigError
from x_transformers.ops import split_heads
from x_transformers.options.schema import Feature, Options, Rule, opt, positive

Threshold: TypeAlias = Literal["silu", "relu", "sharp_softplus", "sigmoid_elementwise"]


@dataclass(frozen=True, kw_only=True)
class GinOptions:
    gin: bool = opt(False, "values are slices of the input, and an MLP for each head follows the aggregation")
    gin_threshold: Threshold | None = opt(
        None, "subtract a learned number from the weights, and apply silu, relu, sharp_softplus or sigmoid_elementwise"
    )
    gin_mult: float = opt(2, "inner width of the MLPs, as a multiple of the width of a head's values")

    def __post_init__(self) -> None:
        positive(gin_mult=self.gin_mult)

    @property
    def slices(self) -> MakeHeads | None:
        """Builder of what replaces the map from the input to values; None if there is such a map."""
        return (lambda dim, heads, width: InputSlices()) if self.gin else None


class InputSlices(nn.Module):
    """Values that are the input itself, in the dtype that a linear map would return under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if x.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        return x


class SharpenedQueries(QKNorm):
    """Learned factor of the queries, and so of the scores: `q <- alpha * q`, with alpha 1 at first."""

    beyond_reference = "graph-aware attention"

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))

    def normalize_q(self, q: Tensor) -> Tensor:
        return q * self.alpha


class WeightThreshold(RowMod):
    """Threshold of the weights, learned: `weights <- act(weights - theta)`, and 0 for hidden keys.

    Args:
        activation: "silu", "relu", "sharp_softplus" (`softplus(beta t) / beta`) or "sigmoid_elementwise"
            (`sigmoid(beta t)`).
        beta: sharpness of the last two.
    """

    stage = Stage.PRODUCT
    beyond_reference = "graph-aware attention"

    def __init__(self, activation: Threshold, beta: float = 10.0) -> None:
        super().__init__()
        self.activation, self.beta = activation, beta
        self.theta = nn.Parameter(torch.tensor(0.2))

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        mask = rows.mask

        def threshold(weights: Tensor) -> Tensor:
            changed = self._activate(weights - self.theta.to(weights.dtype))
            # a weight of 0 would not stay 0: silu(-theta) is negative
            return changed if mask is None else changed.masked_fill(~mask, 0.0)

        return logits, WeightChange(Stage.THRESHOLD, threshold)

    def _activate(self, t: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(t)
        if self.activation == "relu":
            return F.relu(t)
        if self.activation == "sharp_softplus":
            return F.softplus(self.beta * t) / self.beta
        return (self.beta * t).sigmoid()


class GraphIsomorphism(ValueMod):
    """Node update of each head: `out_h <- W2_h silu(rmsnorm(W1_h (epsilon_h x_h + out_h) + b1_h)) + b2_h`.

    x_h is the h-th slice of the (query) input. Queries that see no key have output 0. Matrices of all heads are rows of
    one.

    Args:
        shape: widths of the attention.
        inner: width between the two maps.
    """

    beyond_reference = "graph-aware attention"

    def __init__(self, shape: AttentionShape, inner: int) -> None:
        super().__init__()
        h, e = shape.heads, shape.value_dim_head
        self.heads = h
        self.epsilon = nn.Parameter(torch.zeros(h))
        self.up, self.up_bias = nn.Parameter(torch.empty(h * e, inner)), nn.Parameter(torch.empty(h, inner))
        self.gain = nn.Parameter(torch.ones(h, inner))
        self.down, self.down_bias = nn.Parameter(torch.empty(h * inner, e)), nn.Parameter(torch.empty(h, e))
        for parameter, fan_in in ((self.up, e), (self.up_bias, e), (self.down, inner), (self.down_bias, inner)):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        h, x = self.heads, split_heads(seen.x, self.heads)
        # some parts compute `out` in float32, and the maps have the dtype of the input
        node = self.epsilon[:, None, None] * x + out.to(x.dtype)
        hidden = node @ self.up.unflatten(0, (h, -1)) + self.up_bias[:, None]
        hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * self.gain[:, None].to(hidden.dtype)
        out = F.silu(hidden) @ self.down.unflatten(0, (h, -1)) + self.down_bias[:, None]
        return out if seen.fully_masked is None else out.masked_fill(seen.fully_masked, 0.0)


def build(options: GinOptions, shape: AttentionShape, others: Options, **_: Any) -> GraphIsomorphism:
    """Build the MLPs of one attention.

    Raises:
        ConfigError: if the slices of the input do not fit the heads.
    """
    h, e, context = shape.heads, shape.value_dim_head, others["context"].dim_context
    if shape.kv_heads != h:
        raise ConfigError(
            f"`gin` has a slice of the input for each of the {h} heads, and `kv_heads` is {shape.kv_heads}; drop "
            "`kv_heads` and `one_kv_head`."
        )
    if h * e != shape.dim:
        way_out = "choose other `heads`"
        if shape.dim % h == 0:
            way_out = f"set `dim_head` or `value_dim_head` to {shape.dim // h}"
        raise ConfigError(
            f"`gin` cuts the input into one slice for each head, instead of projecting values, so that `heads` times "
            f"the width of values must be `dim`; {h} * {e} is {h * e}, and `dim` is {shape.dim}: {way_out}."
        )
    if context not in (None, shape.dim):
        raise ConfigError(
            f"`gin` adds slices of the context to those of the input, so that `dim_context` must be `dim`; they are "
            f"{context} and {shape.dim}."
        )
    inner = int(e * options.gin_mult)
    if inner < 1:
        raise ConfigError(f"`gin_mult` is {options.gin_mult}, and values have {e} features; the inner width is 0.")
    return GraphIsomorphism(shape, inner)


def build_queries(options: GinOptions, **_: Any) -> SharpenedQueries:
    """Build the factor of the queries of one attention."""
    return SharpenedQueries()


def build_threshold(options: GinOptions, **_: Any) -> WeightThreshold | None:
    """Build the threshold of one attention; None if there is none."""
    return None if options.gin_threshold is None else WeightThreshold(options.gin_threshold)


FEATURE = Feature(
    name="gin",
    group="attn",
    slot="values",
    options=GinOptions,
    enabled=lambda options: options.gin,
    build=build,
    also={"qk_norm": build_queries, "row": build_threshold},
    summary="heads aggregate slices of the input, each followed by an MLP",
    paper="2501.02393",
    exempt={"export": "the reference has no graph-aware attention"},
    refuses=(
        Rule(
            when=lambda o: o.on("switch_head"),
            why="`gin` takes slices of the input as values, and `switch_experts` are matrices of the maps to values; "
            "drop one of them.",
        ),
        Rule(
            when=lambda o: o["latent"].use_latent_kv,
            why="`gin` takes slices of the input as values, and `use_latent_kv` caches a latent from which values are "
            "projected; drop one of them.",
        ),
        Rule(
            when=lambda o: o.on("laser") and o["gin"].gin_threshold in ("silu", "relu"),
            why=lambda o: (
                f'`laser` takes the logarithm of attention\'s output, and `gin_threshold = "{o["gin"].gin_threshold}"` '
                "makes weights negative, or all of them 0; drop one of them."
            ),
        ),
    ),
    examples=(
        {"attn_gin": True, "attn_dim_head": 4, "attn_gin_threshold": "silu"},
        {"attn_gin": True, "attn_dim_head": 4, "rotary_pos_emb": True},
        {"attn_gin": True, "attn_value_dim_head": 4, "attn_gin_threshold": "sigmoid_elementwise", "attn_gin_mult": 1.5},
    ),
)
