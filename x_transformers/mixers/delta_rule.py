"""DeltaNet (2406.06484), Gated DeltaNet (2412.06464) and KDA (2510.26692): writes replace what their key held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import delta_cost
from x_transformers.mixers.parts import MixerNorm, ShortConvolution, first_step_bias, log_decay, unit
from x_transformers.mixers.read_out import gated_heads
from x_transformers.ops import at_least_float32, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive, require
from x_transformers.options.signatures import takes_fields_of
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.delta import delta


@dataclass(frozen=True, kw_only=True)
class DeltaArguments:
    """Arguments of delta rules.

    Attributes:
        heads: number of value heads h.
        key_heads: number of query and key heads; value head i reads key head `i // (heads // key_heads)`. Default
            `heads`.
        dim_key, dim_value: widths of a head.
        conv: taps of the short convolutions; 0 for none.
        gate: multiply by `silu(to_gate x)` after the norm.
        negative: beta up to 2, so that the state may change its sign (2411.12537).
        products: number of writes a token (2502.10297).
        norm_eps: of the norm of each head's output.
        chunk: tokens that are computed at once.
    """

    heads: int = 8
    key_heads: int | None = None
    dim_key: int | None = None
    dim_value: int | None = None
    conv: int = 4
    gate: bool = False
    negative: bool = False
    products: int = 1
    norm_eps: float = 1e-6
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        at_least(1, heads=self.heads, key_heads=self.key_heads, dim_key=self.dim_key, dim_value=self.dim_value)
        at_least(1, products=self.products, chunk=self.chunk)
        at_least(0, conv=self.conv)
        positive(norm_eps=self.norm_eps)
        if self.key_heads is not None:
            divided(self.heads, self.key_heads, "`heads`")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaArguments(DeltaArguments):
    """Arguments of delta rules with decays.

    Attributes:
        vector_decay: a decay for each key feature, from a map of low rank (2510.26692), instead of one a head.
        rank: of this map; default the width of a head's values.
    """

    gate: bool = True
    vector_decay: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank)
        require(
            self.rank is None or self.vector_decay,
            f"`rank` is {self.rank}, of the map to decays of key features; set `vector_decay = True`, or drop "
            "it (a tuple has a value for each mixer).",
        )


class DeltaRule(Mixer):
    """Abstract base class of delta rules.

    `S_t = (I - beta k k^T) e^g S_{t-1} + beta k v^T` and `o_t = S_t^T q / sqrt(dk)`, with queries, keys and values from
    a linear map, a short convolution and SiLU, and queries and keys of unit length. `beta = sigmoid(to_beta x)`.

    Args:
        dim: width D of the model.
        given: the arguments.
        dim_key, dim_value: widths of a head.

    Attributes:
        decays_by_feature: each key feature has a decay of its own.
    """

    has_gains = True
    decays_by_feature = False

    def __init__(self, dim: int, given: DeltaArguments, dim_key: int, dim_value: int) -> None:
        super().__init__()
        heads, products = given.heads, given.products
        key_heads = heads if given.key_heads is None else given.key_heads
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        self.heads, self.key_heads, self.products, self.chunk = heads, key_heads, products, given.chunk
        self.dim_key, self.dim_value, self.scale = dim_key, dim_value, dim_key**-0.5
        self.most_beta = 2.0 if given.negative else 1.0
        keys, values = key_heads * dim_key, heads * dim_value
        self.to_q = nn.Linear(dim, keys, bias=False)
        self.to_k = nn.Linear(dim, products * keys, bias=False)
        self.to_v = nn.Linear(dim, products * values, bias=False)
        self.to_beta = nn.Linear(dim, products * heads, bias=False)
        self.to_gate = nn.Linear(dim, values, bias=False) if given.gate else None
        self.norm = MixerNorm(dim_value, given.norm_eps)
        self.to_out = nn.Linear(values, dim, bias=False)
        widths = (keys, products * keys, products * values)
        self.conv_q, self.conv_k, self.conv_v = (
            ShortConvolution(width, given.conv) if given.conv else None for width in widths
        )
        self.state_shapes["delta"] = (heads, dim_key, dim_value)
        for name, convolution in self._convolutions().items():
            if convolution.taps > 1:
                self.state_shapes[name] = convolution.state_shape

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Return the logarithms of decays, `(b, h, n)` or `(b, h, n, dk)`; None for none."""
        return None

    def _convolutions(self) -> dict[str, ShortConvolution]:
        found = {"conv_q": self.conv_q, "conv_k": self.conv_k, "conv_v": self.conv_v}
        return {name: each for name, each in found.items() if each is not None}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        left: State = {}
        held = {} if state is None else state
        parts = {"conv_q": self.to_q(x), "conv_k": self.to_k(x), "conv_v": self.to_v(x)}
        for name, convolution in self._convolutions().items():
            parts[name], last = convolution(parts[name], row, held.get(name))
            if name in self.state_shapes:
                left[name] = last
        q, k, v = (F.silu(t) for t in parts.values())
        beta = at_least_float32(self.to_beta(x)).sigmoid() * self.most_beta
        q = unit(split_heads(q, self.key_heads)) * self.scale
        k, v, beta = self._writes(k, self.key_heads), self._writes(v, self.heads), self._writes(beta, self.heads)
        k, beta = unit(k), row_of_writes(row, self.products).silence_heads(beta.squeeze(-1))
        g = self.log_decay(x)
        g = None if g is None else row.silence_heads(g)
        if self.heads != self.key_heads:
            q, k = (t.repeat_interleave(self.heads // self.key_heads, dim=1) for t in (q, k))
        if self.products > 1:
            q, g = spread(q, self.products, last=True), None if g is None else spread(g, self.products, last=False)
        out, left["delta"] = delta(q, k, v, beta, g, held.get("delta"), chunk=self.chunk)
        out = out[:, :, self.products - 1 :: self.products]
        gate = None if self.to_gate is None else self.to_gate(x)
        return self.to_out(gated_heads(self.norm(out), gate, x)), left

    def _writes(self, t: Tensor, heads: int) -> Tensor:
        """Return `(b, n, r h d)` as `(b, h, n r, d)`, with r writes a token."""
        return split_heads(t.unflatten(-1, (self.products, -1)).flatten(1, 2) if self.products > 1 else t, heads)

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        chosen, why, flops = delta_cost(
            situation, tokens, self.dim_key, self.dim_value, self.chunk, self.decays_by_feature
        )
        return chosen, why, self.heads * self.products * flops


def row_of_writes(row: Row, products: int) -> Row:
    """Return which of the writes are those of live tokens."""
    if row.live is None or products == 1:
        return row
    return Row(row.live.repeat_interleave(products, dim=1), row.causal)


def spread(t: Tensor, products: int, *, last: bool) -> Tensor:
    """Return `(b, h, n, ...)` as `(b, h, n r, ...)`: t at the last or the first of r writes of a token, zeros else."""
    zeros = torch.zeros_like(t).unsqueeze(3).expand(*t.shape[:3], products - 1, *t.shape[3:])
    own = t.unsqueeze(3)
    return torch.cat((zeros, own) if last else (own, zeros), dim=3).flatten(2, 3)


class DeltaNet(DeltaRule):
    """Delta rule without decay: `S_t = (I - beta k k^T) S_{t-1} + beta k v^T`; see `DeltaRule`.

    Args:
        dim: width of the model.
        given: see `DeltaArguments`. Widths of a head are `dim / heads` by default.
    """

    name = "delta"

    @takes_fields_of(DeltaArguments)
    def __init__(self, dim: int, given: DeltaArguments) -> None:
        width = dim // given.heads
        super().__init__(dim, given, given.dim_key or width, given.dim_value or width)


class GatedDeltaNet(DeltaRule):
    """Delta rule with a learned decay of each head, or of each key feature; see `DeltaRule`.

    `g = -exp(decay_log) * softplus(to_decay x + decay_bias)`, with one `decay_log` a head.

    Args:
        dim: width of the model.
        given: see `GatedDeltaArguments`. Widths of a head are `0.75 dim / heads` and `1.5 dim / heads` by default.
    """

    name = "gated_delta"

    @takes_fields_of(GatedDeltaArguments)
    def __init__(self, dim: int, given: GatedDeltaArguments) -> None:
        heads = given.heads
        super().__init__(dim, given, given.dim_key or 3 * dim // (4 * heads), given.dim_value or 3 * dim // (2 * heads))
        self.decays_by_feature = given.vector_decay
        if given.vector_decay:
            rank, decays = given.rank or self.dim_value, heads * self.dim_key
            self.to_decay: nn.Module = nn.Sequential(
                nn.Linear(dim, rank, bias=False), nn.Linear(rank, decays, bias=False)
            )
        else:
            decays = heads
            self.to_decay = nn.Linear(dim, decays, bias=False)
        self.decay_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        self.decay_bias = nn.Parameter(first_step_bias(decays))

    def log_decay(self, x: Tensor) -> Tensor:
        step, bias, logs = self.to_decay(x), self.decay_bias, self.decay_log
        if not self.decays_by_feature:
            return log_decay(step, bias, logs)[0].mT
        heads = (self.heads, self.dim_key)
        return log_decay(step.unflatten(-1, heads), bias.view(heads), logs.unsqueeze(-1))[0].transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    key_heads: int | None = opt(
        None, "query and key heads of a delta rule; value head i reads i // (heads / key_heads)"
    )
    negative: bool | None = opt(None, "let writes of a delta rule change the sign of what a key held (2411.12537)")
    products: int | None = opt(None, "writes of a delta rule for each token (2502.10297)")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaOptions:
    vector_decay: bool | None = opt(
        None, "let each key feature of a gated delta rule decay at a rate of its own, as in KDA (2510.26692)"
    )


EXEMPT = {"export": "the reference has no mixers"}

FEATURES = (
    Feature(
        name="delta",
        group="mixer",
        slot="mixer",
        options=DeltaOptions,
        build=DeltaNet,
        summary="delta rule: writes replace what their key held",
        paper="2406.06484",
        exempt=EXEMPT,
        examples=(
            {"mixer": "delta"},
            {"mixer": "delta", "mixer_products": 2, "mixer_negative": True, "mixer_key_heads": 2},
            {"mixer": "delta", "mixer_conv": 0, "mixer_gate": True, "mixer_dim_key": 6, "mixer_dim_value": 3},
        ),
    ),
    Feature(
        name="gated_delta",
        group="mixer",
        slot="mixer",
        options=GatedDeltaOptions,
        build=GatedDeltaNet,
        summary="delta rule with a learned decay",
        paper="2412.06464",
        exempt=EXEMPT,
        examples=(
            {"mixer": "gated_delta", "mixer_dim_key": 4, "mixer_dim_value": 6},
            {"mixer": "gated_delta", "layer_period": "ma", "mixer_heads": 2, "mixer_key_heads": 1, "mixer_products": 2},
            {"mixer": "gated_delta", "mixer_dim_key": 4, "mixer_vector_decay": True, "mixer_rank": 3},
        ),
    ),
)
