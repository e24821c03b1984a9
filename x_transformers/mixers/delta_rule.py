"""DeltaNet (2406.06484) and Gated DeltaNet (2412.06464): memories whose writes replace what their key held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import delta_cost
from x_transformers.mixers.parts import MixerNorm, ShortConvolution, first_step_bias, log_decay, unit
from x_transformers.mixers.read_out import gated_heads
from x_transformers.ops import at_least_float32, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.delta import delta


class DeltaRule(Mixer):
    """Abstract base class of delta rules.

    `S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T` and `o_t = S_t^T q / sqrt(dk)`, with queries, keys and values from
    a linear map, a short convolution and SiLU, and queries and keys of unit length. `beta = sigmoid(to_beta x)`.

    Args:
        dim: width D of the model.
        heads: number of value heads h.
        key_heads: number of query and key heads; value head i reads key head `i // (heads // key_heads)`.
        dim_key, dim_value: widths of a head.
        conv: taps of the short convolutions; 0 for none.
        gate: multiply by `silu(to_gate x)` after the norm.
        negative: beta up to 2, so that the state may change its sign (2411.12537).
        products: number of writes a token (2502.10297).
        norm_eps: of the norm of each head's output.
        chunk: tokens that are computed at once.

    Attributes:
        decays: the decay g is learned; else there is none.
    """

    has_gains = True
    decays: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        key_heads: int | None,
        dim_key: int,
        dim_value: int,
        conv: int,
        gate: bool,
        negative: bool,
        products: int,
        norm_eps: float,
        chunk: int,
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        at_least(1, heads=heads, key_heads=key_heads, dim_key=dim_key, dim_value=dim_value, products=products)
        at_least(1, chunk=chunk)
        at_least(0, conv=conv)
        positive(norm_eps=norm_eps)
        divided(heads, key_heads, "`heads`")
        self.heads, self.key_heads, self.products, self.chunk = heads, key_heads, products, chunk
        self.dim_key, self.dim_value, self.scale = dim_key, dim_value, dim_key**-0.5
        self.most_beta = 2.0 if negative else 1.0
        keys, values = key_heads * dim_key, heads * dim_value
        self.to_q = nn.Linear(dim, keys, bias=False)
        self.to_k = nn.Linear(dim, products * keys, bias=False)
        self.to_v = nn.Linear(dim, products * values, bias=False)
        self.to_beta = nn.Linear(dim, products * heads, bias=False)
        self.to_gate = nn.Linear(dim, values, bias=False) if gate else None
        self.norm = MixerNorm(dim_value, norm_eps)
        self.to_out = nn.Linear(values, dim, bias=False)
        self.to_decay = nn.Linear(dim, heads, bias=False) if self.decays else None
        if self.decays:
            self.decay_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
            self.decay_bias = nn.Parameter(first_step_bias(heads))
        widths = (keys, products * keys, products * values)
        self.conv_q, self.conv_k, self.conv_v = (ShortConvolution(w, conv) if conv else None for w in widths)
        self.state_shapes["delta"] = (heads, dim_key, dim_value)
        for name, convolution in self._convolutions().items():
            if convolution.taps > 1:
                self.state_shapes[name] = convolution.state_shape

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
        g = None
        if self.to_decay is not None:
            decay, _ = log_decay(self.to_decay(x), self.decay_bias, self.decay_log)
            g = row.silence_heads(decay.mT)
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
        chosen, why, flops = delta_cost(situation, tokens, self.dim_key, self.dim_value, self.chunk)
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
    """Delta rule without decay: `S_t = (I - beta k k^T) S_{t-1} + beta k v^T`; see `DeltaRule` for the arguments.

    Args:
        dim: width of the model.
        heads: number of value heads.
        key_heads: number of query and key heads; default `heads`.
        dim_key, dim_value: widths of a head; default `dim / heads`.
        conv: taps of the short convolutions.
        gate: gate the output.
        negative: beta up to 2.
        products: writes a token.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    name = "delta"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        key_heads: int | None = None,
        dim_key: int | None = None,
        dim_value: int | None = None,
        conv: int = 4,
        gate: bool = False,
        negative: bool = False,
        products: int = 1,
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
    ) -> None:
        at_least(1, heads=heads)
        super().__init__(
            dim,
            heads=heads,
            key_heads=key_heads,
            dim_key=dim // heads if dim_key is None else dim_key,
            dim_value=dim // heads if dim_value is None else dim_value,
            conv=conv,
            gate=gate,
            negative=negative,
            products=products,
            norm_eps=norm_eps,
            chunk=chunk,
        )


class GatedDeltaNet(DeltaRule):
    """Delta rule with a learned decay of each head; see `DeltaRule` for the arguments.

    `g = -exp(decay_log) * softplus(to_decay x + decay_bias)`.

    Args:
        dim: width of the model.
        heads: number of value heads.
        key_heads: number of query and key heads; default `heads`.
        dim_key, dim_value: widths of a head; default `0.75 dim / heads` and `1.5 dim / heads`.
        conv: taps of the short convolutions.
        gate: gate the output.
        negative: beta up to 2.
        products: writes a token.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    name = "gated_delta"
    decays = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        key_heads: int | None = None,
        dim_key: int | None = None,
        dim_value: int | None = None,
        conv: int = 4,
        gate: bool = True,
        negative: bool = False,
        products: int = 1,
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
    ) -> None:
        at_least(1, heads=heads)
        super().__init__(
            dim,
            heads=heads,
            key_heads=key_heads,
            dim_key=3 * dim // (4 * heads) if dim_key is None else dim_key,
            dim_value=3 * dim // (2 * heads) if dim_value is None else dim_value,
            conv=conv,
            gate=gate,
            negative=negative,
            products=products,
            norm_eps=norm_eps,
            chunk=chunk,
        )


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    key_heads: int | None = opt(
        None, "query and key heads of a delta rule; value head i reads i // (heads / key_heads)"
    )
    negative: bool | None = opt(None, "let writes of a delta rule change the sign of what a key held (2411.12537)")
    products: int | None = opt(None, "writes of a delta rule for each token (2502.10297)")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaOptions:
    pass


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
        ),
    ),
)
