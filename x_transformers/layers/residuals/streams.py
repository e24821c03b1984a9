"""Several residual streams: hyper-connections, which learn how streams mix (2409.19606; doubly stochastic mixing,
2512.24880), and a gated read and write of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, ShapeError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import ResidualConnection, StreamFrame, SublayerContext, own_keywords
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.options.schema import Feature, Rule, opt, require

Kept = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    num_residual_streams: int = opt(1, "streams; above 1 they are joined by hyper-connections")
    hyper_conn_sinkhorn_iters: int = opt(5, "iterations that make the mixing of streams doubly stochastic")
    hyper_conn_reference_mix: bool = opt(False, "mix by a matrix of ones, as checkpoints of x-transformers expect")
    gated_multi_residual: bool = opt(False, "gated reading and writing of streams; needs `read_gate_rank`")

    def __post_init__(self) -> None:
        for name in ("num_residual_streams", "hyper_conn_sinkhorn_iters"):
            require(getattr(self, name) >= 1, f"`{name}` is {getattr(self, name)}; it must be at least 1.")

    @property
    def on(self) -> bool:
        return self.num_residual_streams > 1 or self.gated_multi_residual


class LearnedStreams(ReadsReference, StreamFrame):
    """Copies of the input, each with an embedding of its own; in the end, their sum.

    Args:
        dim: width.
        streams: s; a single one has no embedding.
    """

    def __init__(self, dim: int, streams: int) -> None:
        super().__init__()
        self.emb = nn.Parameter(torch.zeros(streams, dim)) if streams > 1 else None

    def expand(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2)
        return x if self.emb is None else x + self.emb

    def collapse(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        return stream.sum(dim=-2)


class StreamConnection(ResidualConnection):
    """A connection over s streams. Outside of a stack they are folded into the batch, `(b * s, n, D)`."""

    streams: int

    def prepare(self, residuals: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of streams `(b * s, n, D)`: the branch's input `(b, n, D)`, or `(3, b, n, D)`; streams to keep; `beta`."""
        view, (kept, beta) = self.read(self._unfold(residuals))
        return view, kept.transpose(1, 2).flatten(0, 1), {"beta": beta}

    def forward(self, x: Tensor, residuals: Tensor, *, beta: Tensor) -> Tensor:
        """The streams `(b * s, n, D)` behind a branch that gave `x (b, n, D)`; see `prepare`."""
        return self.write(x, (self._unfold(residuals), beta)).transpose(1, 2).flatten(0, 1)

    def _unfold(self, residuals: Tensor) -> Tensor:
        if residuals.ndim != 3 or residuals.shape[0] % self.streams:
            raise ShapeError(
                f"the streams have shape {tuple(residuals.shape)}; they must be (batch * {self.streams}, n, width)."
            )
        return residuals.unflatten(0, (-1, self.streams)).transpose(1, 2)


class HyperConnection(ReadsReference, StreamConnection):
    """Reads a learned mix of the streams, mixes the streams, and writes to each with a learned weight.

    With `N = LayerNorm(R)`: `[A_in | A_res] = N W * a + static`, views `sigmoid(A_in)^T R`, kept
    `sinkhorn(A_res)^T R`, weights `2 sigmoid(2 sigmoid(N w) * c + static)`.

    Args:
        dim: width.
        layer_index: which stream is read first: `layer_index % num_residual_streams`.
        num_residual_streams: s.
        num_input_views: 1, or 3 where queries, keys and values read mixes of their own.
        sinkhorn_iters: iterations that make the mixing matrix doubly stochastic.
        reference_mix: mix by ones instead.
    """

    def __init__(
        self,
        dim: int,
        *,
        layer_index: int,
        num_residual_streams: int,
        num_input_views: int = 1,
        sinkhorn_iters: int = 5,
        reference_mix: bool = False,
    ) -> None:
        super().__init__()
        s, v = num_residual_streams, num_input_views
        self.streams, self.views = s, v
        self.sinkhorn_iters, self.reference_mix = sinkhorn_iters, reference_mix
        self.norm = LayerNorm(dim)
        first = torch.zeros(s, v)
        first[layer_index % s] = 1.0
        self.static_alpha = nn.Parameter(torch.cat((first, torch.eye(s)), dim=-1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, v + s))
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(1e-2))
        self.static_beta = nn.Parameter(torch.ones(s))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
        self.dynamic_beta_scale = nn.Parameter(torch.tensor(1e-2))

    def frame(self) -> LearnedStreams:
        return LearnedStreams(self.dynamic_beta_fn.shape[0], self.streams)

    def read(self, stream: Tensor) -> tuple[Tensor, Kept]:
        """`(b, n, s, D)` to the view `(b, n, D)` or views `(v, b, n, D)`, and what is kept."""
        normed = self.norm(stream)
        alpha = normed @ self.dynamic_alpha_fn * self.dynamic_alpha_scale + self.static_alpha
        reading, mixing = alpha[..., : self.views].sigmoid(), alpha[..., self.views :]
        beta = 2 * (normed @ self.dynamic_beta_fn).sigmoid() * self.dynamic_beta_scale + self.static_beta
        views = torch.einsum("bnsv,bnsd->vbnd", reading, stream)
        if self.reference_mix:
            kept = stream.sum(dim=-2, keepdim=True).expand_as(stream)
        else:
            kept = torch.einsum("bnst,bnsd->bntd", sinkhorn(mixing, self.sinkhorn_iters), stream)
        return views[0] if self.views == 1 else views, (kept, 2 * beta.sigmoid())

    def write(self, out: Tensor, kept: Kept, layer: LayerCall | None = None) -> Tensor:
        mixed, beta = kept
        return mixed + beta.unsqueeze(-1) * out.unsqueeze(-2)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}norm.weight", f"{prefix}norm.gamma")


def sinkhorn(t: Tensor, iters: int = 20) -> Tensor:
    """The nearly doubly stochastic matrix that alternating divisions by row and column sums lead to, in float32.

    `(..., s, t)`, source streams by target streams: softmax over sources, then `iters` times by the sums over
    targets and over sources.
    """
    m = t.to(torch.promote_types(t.dtype, torch.float32)).softmax(dim=-2)
    for _ in range(iters):
        m = m / m.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        m = m / m.sum(dim=-2, keepdim=True).clamp(min=1e-12)
    return m.to(t.dtype)


class GatedMultiResidual(StreamConnection):
    """Reads and writes streams through gates that a bottleneck computes from all of them.

    With `N = rms(R) * gain`: `z = silu(W N / s) * a`, views `mean_s(sigmoid(U z + static) * N)`, weights
    `2 sigmoid(V z + static)`. The streams themselves are kept.

    Args:
        dim: width.
        layer_index: which stream is read first: `layer_index % num_residual_streams`.
        num_residual_streams: s.
        num_input_views: 1, or 3 where queries, keys and values read mixes of their own.
        read_gate_rank: width of the bottleneck.

    Raises:
        ConfigError: without a rank.
    """

    def __init__(
        self,
        dim: int,
        *,
        layer_index: int,
        num_residual_streams: int,
        num_input_views: int = 1,
        read_gate_rank: int | None = None,
    ) -> None:
        super().__init__()
        if read_gate_rank is None or read_gate_rank < 1:
            raise ConfigError(
                f"`gated_multi_residual` needs the width of its bottleneck, at least 1, but `read_gate_rank` is "
                f"{read_gate_rank}; pass `residual_fn_kwargs = dict(read_gate_rank = ...)`."
            )
        s, v = num_residual_streams, num_input_views
        self.streams, self.views = s, v
        self.read_gain = nn.Parameter(torch.ones(s, dim))
        first = torch.zeros(v, s, dim)
        first[:, layer_index % s] = 1.0
        self.static_read_logit = nn.Parameter(first)
        self.static_write_logit = nn.Parameter(torch.zeros(s))
        self.to_bottleneck = nn.Linear(s * dim, read_gate_rank, bias=False)
        self.to_read_gate = nn.Linear(read_gate_rank, v * s * dim, bias=False)
        self.to_write_gate = nn.Linear(read_gate_rank, s, bias=False)
        for gate in (self.to_read_gate, self.to_write_gate):
            nn.init.zeros_(gate.weight)
        self.dynamic_gate_scale = nn.Parameter(torch.tensor(1e-2))

    def frame(self) -> LearnedStreams:
        return LearnedStreams(self.read_gain.shape[1], self.streams)

    def read(self, stream: Tensor) -> tuple[Tensor, Kept]:
        """`(b, n, s, D)` to the view `(b, n, D)` or views `(v, b, n, D)`, and what is kept."""
        normed = F.rms_norm(stream, stream.shape[-1:]) * self.read_gain
        hidden = F.silu(self.to_bottleneck(normed.flatten(-2) / self.streams)) * self.dynamic_gate_scale
        gates = self.to_read_gate(hidden).unflatten(-1, self.static_read_logit.shape) + self.static_read_logit
        views = torch.einsum("bnvsd,bnsd->vbnd", gates.sigmoid(), normed) / self.streams
        beta = 2 * (self.to_write_gate(hidden) + self.static_write_logit).sigmoid()
        return views[0] if self.views == 1 else views, (stream, beta)

    def write(self, out: Tensor, kept: Kept, layer: LayerCall | None = None) -> Tensor:
        stream, beta = kept
        return stream + beta.unsqueeze(-1) * out.unsqueeze(-2)


def build(options: StreamOptions, place: SublayerContext) -> ResidualConnection:
    """The part for one sublayer."""
    shared: dict[str, Any] = {
        "layer_index": place.index,
        "num_residual_streams": options.num_residual_streams,
        "num_input_views": place.views,
    }
    if options.gated_multi_residual:
        return GatedMultiResidual(place.dim, **shared, **own_keywords(place, ("read_gate_rank",)))
    shared["sinkhorn_iters"] = options.hyper_conn_sinkhorn_iters
    shared["reference_mix"] = options.hyper_conn_reference_mix
    return HyperConnection(place.dim, **{**shared, **own_keywords(place, ("sinkhorn_iters",))})


FEATURE = Feature(
    name="residual_streams",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=StreamOptions,
    enabled=lambda options: options.on,
    build=build,
    summary="several residual streams",
    paper="2409.19606",
    idle=lambda options: (
        ("hyper_conn_sinkhorn_iters", "hyper_conn_reference_mix")
        if options.gated_multi_residual
        else ("hyper_conn_sinkhorn_iters",)
        if options.hyper_conn_reference_mix
        else ()
    ),
    refuses=(
        Rule(
            when=lambda o: o["residual_streams"].gated_multi_residual and o["norm_placement"].sandwich_norm,
            why="`gated_multi_residual` norms the streams behind the residual; drop `sandwich_norm`.",
        ),
    ),
    examples=(
        {"num_residual_streams": 3},
        {"num_residual_streams": 2, "qkv_receive_diff_residuals": True},
        {"num_residual_streams": 2, "hyper_conn_reference_mix": True},
        {"num_residual_streams": 2, "gated_multi_residual": True, "residual_fn_kwargs": {"read_gate_rank": 3}},
        {
            "gated_multi_residual": True,
            "residual_fn_kwargs": {"read_gate_rank": 3},
            "qkv_receive_diff_residuals": True,
        },
    ),
)
