"""Several residual streams: hyper-connections (2409.19606), with doubly stochastic mixing (2512.24880), and gated
streams.

A sublayer reads one mix of the s streams (or three, for queries, keys and values), and its output is added to every
stream with a weight of its own: `R_t <- sum_s M_st R_s + beta_t * out`. Hyper-connections compute the mixing matrix M
from the streams; gated streams keep them as they are (M = 1) and gate every feature that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, ShapeError, StateDictError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import ResidualConnection, StreamFrame, SublayerContext, own_keywords
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, at_least, opt, require

Kept = tuple[Tensor, Tensor]
"""Mixed streams `(b, n, s, D)`, and the weights `(b, n, s)` with which an output is added to them."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    num_residual_streams: int = opt(1, "number of residual streams; more than 1 are joined by hyper-connections")
    hyper_conn_sinkhorn_iters: int = opt(5, "iterations that make the mixing matrix of the streams doubly stochastic")
    hyper_conn_reference_mix: bool = opt(
        False, "mix streams by a matrix of ones, as checkpoints of x-transformers expect"
    )
    gated_multi_residual: bool = opt(
        False, "read and write streams through gates; needs `read_gate_rank` in `residual_fn_kwargs`"
    )

    def __post_init__(self) -> None:
        for name in ("num_residual_streams", "hyper_conn_sinkhorn_iters"):
            require(getattr(self, name) >= 1, f"`{name}` is {getattr(self, name)}; it must be at least 1.")

    @property
    def on(self) -> bool:
        return self.num_residual_streams > 1 or self.gated_multi_residual


class LearnedStreams(ReadsReference, StreamFrame):
    """Entry `R_s = x + e_s` with a learned embedding per stream, initially 0, and exit `sum_s R_s`.

    Args:
        dim: model width D.
        streams: number of streams s; a single stream has no embedding.
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
    """Residual connection over s streams, which outside of a stack are folded into the batch: `(b * s, n, D)`."""

    streams: int

    def prepare(self, residuals: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Split streams into the branch's input, and the arguments with which to call this module after it.

        Args:
            residuals: `(b * s, n, D)` streams.

        Returns:
            The branch's input `(b, n, D)`, or `(3, b, n, D)` with three views; the mixed streams `(b * s, n, D)`;
            and `{"beta": (b, n, s)}`, the weights with which the branch's output is added to the streams.
        """
        view, (kept, beta) = self.read(self._unfold(residuals))
        return view, kept.transpose(1, 2).flatten(0, 1), {"beta": beta}

    def forward(self, x: Tensor, residuals: Tensor, *, beta: Tensor) -> Tensor:
        """Return the streams `(b * s, n, D)` after a branch.

        Args:
            x: `(b, n, D)` output of the branch.
            residuals: `(b * s, n, D)` mixed streams from `prepare`.
            beta: `(b, n, s)` weights from `prepare`.

        Raises:
            ShapeError: if the batch is not a multiple of the number of streams.
        """
        return self.write(x, (self._unfold(residuals), beta)).transpose(1, 2).flatten(0, 1)

    def _unfold(self, residuals: Tensor) -> Tensor:
        if residuals.ndim != 3 or residuals.shape[0] % self.streams:
            raise ShapeError(
                f"`residuals` has shape {tuple(residuals.shape)}; it must be (batch * {self.streams}, n, width), "
                f"with the {self.streams} streams folded into the batch."
            )
        return residuals.unflatten(0, (-1, self.streams)).transpose(1, 2)


class HyperConnection(ReadsReference, StreamConnection):
    """Hyper-connection: a residual connection whose streams are read, mixed and written with learned weights.

    For the streams `R (s, D)` of one token and `N = LayerNorm(R)`:

    - `[A_in | A_res] = (N W) * a + static_alpha`, of shape `(s, v + s)` for v views;
    - the sublayer reads the views `sigmoid(A_in)^T R`;
    - the streams become `sinkhorn(A_res)^T R + beta out^T`, with
      `beta = 2 sigmoid(2 sigmoid(N w) * b + static_beta)`.

    `W` and `w` are zero at first. The static part then starts with stream `layer_index % s` as the one that is read
    most, and with the identity as the logits of the mixing matrix.

    Args:
        dim: model width D.
        layer_index: index of the sublayer; it selects the stream that is read most at first.
        num_residual_streams: number of streams s.
        num_input_views: number of views v: 3 if queries, keys and values each read their own mix, else 1.
        sinkhorn_iters: iterations that make the mixing matrix doubly stochastic.
        reference_mix: replace the mixing matrix by ones, as checkpoints of the reference expect.
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
        at_least(1, dim=dim, num_residual_streams=num_residual_streams, num_input_views=num_input_views)
        at_least(1, sinkhorn_iters=sinkhorn_iters)
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
        """Return the view `(b, n, D)`, or views `(v, b, n, D)`, of the streams `(b, n, s, D)`; and `Kept`."""
        normed = self.norm(stream)
        # one product for both halves: the first v columns are logits of the views, the other s of the mixing matrix
        alpha = normed @ self.dynamic_alpha_fn * self.dynamic_alpha_scale + self.static_alpha
        reading, mixing = alpha[..., : self.views].sigmoid(), alpha[..., self.views :]
        beta = 2 * (normed @ self.dynamic_beta_fn).sigmoid() * self.dynamic_beta_scale + self.static_beta
        views = torch.einsum("bnsv,bnsd->vbnd", reading, stream)
        if self.reference_mix:
            # every stream becomes the sum of all streams, as in the models that such checkpoints come from
            kept = stream.sum(dim=-2, keepdim=True).expand_as(stream)
        else:
            kept = torch.einsum("bnst,bnsd->bntd", sinkhorn(mixing, self.sinkhorn_iters), stream)
        return views[0] if self.views == 1 else views, (kept, 2 * beta.sigmoid())

    def write(self, out: Tensor, kept: Kept, layer: LayerCall | None = None) -> Tensor:
        mixed, beta = kept
        return mixed + beta.unsqueeze(-1) * out.unsqueeze(-2)

    def reference_names(self) -> Mapping[str, str]:
        return {"norm.weight": "norm.gamma"}

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if not self.reference_mix:
            raise StateDictError(
                "the reference mixes residual streams by a matrix of ones, so that these weights would give other "
                "outputs there. Only a model with `hyper_conn_reference_mix = True` can be exported."
            )
        super().export_reference(state, prefix)


def sinkhorn(t: Tensor, iters: int = 20) -> Tensor:
    """Return a nearly doubly stochastic matrix from logits, by Sinkhorn's iteration in float32.

    A softmax over sources comes first; each iteration then divides by the sums over targets and by the sums over
    sources. Rows and columns that sum to 1 keep the size of the residual stream, however many layers mix it.

    Args:
        t: `(..., s, t)` logits, source streams by target streams.
        iters: number of iterations.

    Returns:
        `(..., s, t)`, nonnegative; the sums over sources are 1, those over targets nearly so.
    """
    # Sums over sources are made 1 last, so that these are exact: each new stream is a weighted mean of the old ones.
    # The clamp is for a source whose weights underflow for every target.
    m = t.to(torch.promote_types(t.dtype, torch.float32)).softmax(dim=-2)
    for _ in range(iters):
        m = m / m.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        m = m / m.sum(dim=-2, keepdim=True).clamp(min=1e-12)
    return m.to(t.dtype)


class GatedMultiResidual(StreamConnection):
    """Residual connection whose streams are read and written through gates, computed by a bottleneck from all streams.

    For the streams `R (s, D)` of one token and `N = rms(R) * gain`:

    - `z = silu(W N / s) * a`, the bottleneck over all `s * D` features;
    - the sublayer reads the views `mean_s(sigmoid(U z + static_read) * N)`, with a gate for each feature;
    - the streams become `R + beta out^T` with `beta = 2 sigmoid(V z + static_write)`.

    `U` and `V` are zero at first, so that the static logits decide: stream `layer_index % s` is read most, and every
    stream receives the output once (`beta = 1`).

    Args:
        dim: model width D.
        layer_index: index of the sublayer; it selects the stream that is read most at first.
        num_residual_streams: number of streams s.
        num_input_views: number of views: 3 if queries, keys and values each read their own, else 1.
        read_gate_rank: width of the bottleneck; required.

    Raises:
        ConfigError: if `read_gate_rank` is missing or below 1.
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
        at_least(1, dim=dim, num_residual_streams=num_residual_streams, num_input_views=num_input_views)
        if read_gate_rank is None or read_gate_rank < 1:
            raise ConfigError(
                f"`gated_multi_residual` needs a bottleneck of width at least 1, but `read_gate_rank` is "
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
        """Return the view `(b, n, D)`, or views `(v, b, n, D)`, of the streams `(b, n, s, D)`; and `Kept`."""
        normed = F.rms_norm(stream, stream.shape[-1:]) * self.read_gain
        hidden = F.silu(self.to_bottleneck(normed.flatten(-2) / self.streams)) * self.dynamic_gate_scale
        gates = self.to_read_gate(hidden).unflatten(-1, self.static_read_logit.shape) + self.static_read_logit
        views = torch.einsum("bnvsd,bnsd->vbnd", gates.sigmoid(), normed) / self.streams
        beta = 2 * (self.to_write_gate(hidden) + self.static_write_logit).sigmoid()
        # only the views are normalized: the streams themselves are an identity path through all layers
        return views[0] if self.views == 1 else views, (stream, beta)

    def write(self, out: Tensor, kept: Kept, layer: LayerCall | None = None) -> Tensor:
        stream, beta = kept
        return stream + beta.unsqueeze(-1) * out.unsqueeze(-2)


def build(options: StreamOptions, sublayer: SublayerContext) -> ResidualConnection:
    """Build the residual connection of one sublayer."""
    shared: dict[str, Any] = {
        "layer_index": sublayer.index,
        "num_residual_streams": options.num_residual_streams,
        "num_input_views": sublayer.views,
    }
    if options.gated_multi_residual:
        return GatedMultiResidual(sublayer.dim, **shared, **own_keywords(sublayer, ("read_gate_rank",)))
    shared["sinkhorn_iters"] = options.hyper_conn_sinkhorn_iters
    shared["reference_mix"] = options.hyper_conn_reference_mix
    return HyperConnection(sublayer.dim, **{**shared, **own_keywords(sublayer, ("sinkhorn_iters",))})


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
            when=lambda o: (
                o["residual_streams"].gated_multi_residual
                and (o["norm_placement"].output or not o["norm_placement"].pre_norm_has_first_norm)
            ),
            why="`gated_multi_residual` normalizes the streams after each sublayer; drop `sandwich_norm`, "
            "`branch_norm` and `pre_norm_has_first_norm`.",
        ),
    ),
    exempt={("export", number): "the reference mixes streams by another matrix" for number in (1, 2)},
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
