"""Linear attention (2006.16236), with features of Hedgehog (2402.04347) and the norm of TransNormer (2210.10340)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import MixerGain, rms
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive, require
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.linear import linear

FeatureMap = Literal["elu1", "elu", "relu", "hedgehog"]
NormName = Literal["simple_rms", "layernorm"]

SMALLEST = 1e-10
"""Added to denominators."""


class HedgehogMap(nn.Module):
    """Features that imitate softmax: `softmax([2 (W x + b), -2 (W x + b)])`, with `W` the identity at first.

    Args:
        dim: width of a head.
        heads: number of heads with maps of their own; None for one map of all heads.
    """

    def __init__(self, dim: int, heads: int | None) -> None:
        super().__init__()
        own = () if heads is None else (heads,)
        self.weight = nn.Parameter(torch.eye(dim).expand(*own, dim, dim).clone())
        self.bias = nn.Parameter(torch.zeros(*own, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(b, h, n, 2 d)` features of `(b, h, n, d)`."""
        mapped = 2 * (x @ self.weight.mT.to(x.dtype) + self.bias.unsqueeze(-2).to(x.dtype))
        return torch.cat((mapped, -mapped), dim=-1).softmax(dim=-1)


class OutputRMSNorm(nn.Module):
    """Root mean square norm of the outputs of all heads together, without a gain.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., dim)`, at least in float32."""
        return rms(x, self.eps)


class OutputLayerNorm(MixerGain):
    """LayerNorm of the outputs of all heads together, with gain `1 + gamma` and bias `beta`.

    Args:
        dim: number of features.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim)
        self.eps, self.beta = eps, nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., dim)`, at least in float32."""
        x, gain = at_least_float32(x), 1 + self.gamma if self.unit_offset else self.gamma
        return F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), self.beta.to(x.dtype), self.eps)


def output_norm(name: str, dim: int, eps: float) -> nn.Module:
    """Build a norm of the outputs of all heads."""
    return OutputLayerNorm(dim, eps) if name == "layernorm" else OutputRMSNorm(eps)


class LinearAttention(Mixer):
    """Linear attention: `o_t = sum_s phi(q_t) . phi(k_s) v_s`, over all tokens, or up to t in causal passes.

    Args:
        dim: width D of the model.
        heads: number of heads.
        inner: width of queries, keys and values of all heads; default `dim`.
        feature_map: phi: "elu1" is `1 + elu`, "elu", "relu", or "hedgehog", which is learned.
        map_per_head: "hedgehog" has a map for each head.
        denominator: divide by `sum_s phi(q_t) . phi(k_s)`.
        norm: of the output of all heads: "simple_rms" (no gain), "layernorm", or None.
        gate: multiply the output by `silu(to_gate x)`.
        bias: linear maps have biases, and values go through SiLU, as in TransNormer.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    has_whole_form = True
    has_gains = True

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        inner: int | None,
        feature_map: str,
        map_per_head: bool,
        denominator: bool,
        norm: str | None,
        gate: bool,
        bias: bool,
        norm_eps: float,
        chunk: int,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, chunk=chunk)
        positive(norm_eps=norm_eps)
        inner = dim if inner is None else inner
        width = divided(inner, heads, "the inner width (`dim`)")
        learned = feature_map == "hedgehog"
        require(
            not (denominator and feature_map == "elu"),
            '`feature_map = "elu"` may be negative, so that a sum of weights may be 0; take "elu1", or '
            "`denominator = False`.",
        )
        require(learned or not map_per_head, '`map_per_head` is of `feature_map = "hedgehog"`; take it, or drop this.')
        self.heads, self.width, self.chunk = heads, width, chunk
        self.feature_map, self.denominator, self.activated = feature_map, denominator, bias
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.to_gate = nn.Linear(dim, inner, bias=bias) if gate else None
        self.to_out = nn.Linear(inner, dim, bias=bias)
        self.map_q, self.map_k = (
            HedgehogMap(width, heads if map_per_head else None) if learned else None for _ in range(2)
        )
        self.norm = None if norm is None else output_norm(norm, inner, norm_eps)
        self.state_shapes["linear"] = (heads, 2 * width if learned else width, width + denominator)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        q, k, v = (at_least_float32(split_heads(to(x), self.heads)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = self._features(q, self.map_q), row.silence_heads(self._features(k, self.map_k))
        v = F.silu(v) if self.activated else v
        if self.denominator:
            v = F.pad(v, (0, 1), value=1.0)
        if row.causal:
            out, held = linear(q, k, v, None, None if state is None else state["linear"], chunk=self.chunk)
        else:
            held = k.mT @ v
            out = q @ held
        if self.denominator:
            out = out[..., :-1] / (out[..., -1:] + SMALLEST)
        merged = merge_heads(out)
        if self.norm is not None:
            merged = self.norm(merged)
        if self.to_gate is not None:
            merged = merged * F.silu(self.to_gate(x))
        return self.to_out(merged.to(x.dtype)), {"linear": held}

    def _features(self, t: Tensor, learned: HedgehogMap | None) -> Tensor:
        if learned is not None:
            return learned(t)
        if self.feature_map == "relu":
            return F.relu(t)
        return F.elu(t) + 1 if self.feature_map == "elu1" else F.elu(t)

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        _, d, e = self.state_shapes["linear"]
        return linear_cost(situation, tokens, self.heads, d, e, self.chunk)


class PlainLinearAttention(LinearAttention):
    """Linear attention with a denominator; see `LinearAttention` for the arguments.

    Args:
        dim: width of the model.
        heads: number of heads.
        feature_map: phi.
        denominator: divide by the sum of weights.
        norm: norm of the output.
        gate: gate the output.
        norm_eps: of the norm; default 1e-6.
        chunk: tokens that are computed at once.
    """

    name = "linear"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        feature_map: FeatureMap = "elu1",
        denominator: bool = True,
        norm: NormName | None = None,
        gate: bool = False,
        norm_eps: float | None = None,
        chunk: int = CHUNK,
    ) -> None:
        require(
            norm is not None or norm_eps is None,
            "`norm_eps` is of `norm`, which is None; choose one, or drop `norm_eps`.",
        )
        super().__init__(
            dim,
            heads=heads,
            inner=None,
            feature_map=feature_map,
            map_per_head=False,
            denominator=denominator,
            norm=norm,
            gate=gate,
            bias=False,
            norm_eps=1e-6 if norm_eps is None else norm_eps,
            chunk=chunk,
        )


class Hedgehog(LinearAttention):
    """Linear attention with learned features that imitate softmax; see `LinearAttention` for the arguments.

    Args:
        dim: width of the model.
        heads: number of heads.
        map_per_head: a map for each head.
        gate: gate the output.
        chunk: tokens that are computed at once.
    """

    name = "hedgehog"
    has_gains = False

    def __init__(
        self, dim: int, heads: int = 8, map_per_head: bool = False, gate: bool = False, chunk: int = CHUNK
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            inner=None,
            feature_map="hedgehog",
            map_per_head=map_per_head,
            denominator=True,
            norm=None,
            gate=gate,
            bias=False,
            norm_eps=1e-6,
            chunk=chunk,
        )


class TransNormer(LinearAttention):
    """Linear attention with a norm instead of a denominator; see `LinearAttention` for the arguments.

    Args:
        dim: width of the model.
        heads: number of heads.
        inner_dim: width of queries, keys and values of all heads; default `dim`.
        feature_map: phi.
        norm: norm of the output.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    name = "transnormer"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        inner_dim: int | None = None,
        feature_map: FeatureMap = "elu1",
        norm: NormName = "simple_rms",
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            inner=inner_dim,
            feature_map=feature_map,
            map_per_head=False,
            denominator=False,
            norm=norm,
            gate=True,
            bias=True,
            norm_eps=norm_eps,
            chunk=chunk,
        )


@dataclass(frozen=True, kw_only=True)
class LinearAttentionOptions:
    feature_map: FeatureMap | None = opt(None, 'features of linear attention: "elu1", "elu", "relu" or "hedgehog"')
    denominator: bool | None = opt(None, "divide linear attention by the sum of its weights")
    norm: NormName | None = opt(None, 'norm of the output of linear attention: "simple_rms" or "layernorm"')


@dataclass(frozen=True, kw_only=True)
class HedgehogOptions:
    map_per_head: bool | None = opt(None, "learn the features of each head by itself")


@dataclass(frozen=True, kw_only=True)
class TransNormerOptions:
    pass


EXEMPT = {"export": "the reference has no mixers"}

FEATURES = (
    Feature(
        name="linear",
        group="mixer",
        slot="mixer",
        options=LinearAttentionOptions,
        build=PlainLinearAttention,
        summary="linear attention with a denominator",
        paper="2006.16236",
        exempt=EXEMPT,
        examples=(
            {"mixer": "linear"},
            {"mixer": "linear", "mixer_feature_map": "relu", "mixer_norm": "layernorm", "mixer_gate": True},
            {"mixer": "linear", "mixer_feature_map": "elu", "mixer_denominator": False, "mixer_norm": "simple_rms"},
        ),
    ),
    Feature(
        name="hedgehog",
        group="mixer",
        slot="mixer",
        options=HedgehogOptions,
        build=Hedgehog,
        summary="linear attention with learned features that imitate softmax",
        paper="2402.04347",
        exempt=EXEMPT,
        examples=({"mixer": "hedgehog"}, {"mixer": "hedgehog", "mixer_map_per_head": True, "layer_period": "mma"}),
    ),
    Feature(
        name="transnormer",
        group="mixer",
        slot="mixer",
        options=TransNormerOptions,
        build=TransNormer,
        summary="linear attention with a norm instead of a denominator",
        paper="2210.10340",
        exempt=EXEMPT,
        examples=(
            {"mixer": "transnormer"},
            {"mixer": "transnormer", "mixer_dim": 24, "mixer_feature_map": "elu", "mixer_norm": "layernorm"},
        ),
    ),
)
