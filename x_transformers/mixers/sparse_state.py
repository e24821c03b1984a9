"""Sparse state expansion (2507.16577): many states, of which each token writes and reads a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import LowRank, MixerNorm
from x_transformers.mixers.read_out import gated_heads
from x_transformers.ops import at_least_float32, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive, require
from x_transformers.recurrences.base import SHORT
from x_transformers.recurrences.partitions import Reads, partitioned
from x_transformers.routing.base import AuxLoss, Routing, RoutingRecord
from x_transformers.routing.losses import LossWeights, record_routing


class SparseState(Mixer):
    """Gated linear attention with a shared state and `partitions` others, of which each token uses `top`.

    With shares `e = softmax(to_route x)`, a token writes and reads its largest partitions with `q e_p` and `k e_p`.
    Queries are `silu(q)`, keys `softmax(k)`, values `silu(v)`; those of partitions have a map of low rank besides.
    Partitions that a token does not choose neither change nor decay. The output is `to_out(rms(o) * silu(to_gate x))`.

    A balance loss, `P / top sum_p mean(e_p) mean(chosen_p)` over the tokens of a batch, joins the auxiliary losses.

    Args:
        dim: width D of the model.
        heads: number of heads.
        dim_key: width of a head's queries and keys; default `dim / (2 heads)`.
        dim_value: width of a head's values; default `dim / heads`.
        partitions: number of partitions P.
        top: number of partitions that a token uses.
        rank: of the maps to decays, and of those that tell partitions from the shared state.
        gate_scale: what logarithms of decays are divided by.
        norm_eps: of the norm.
        balance_loss_weight: weight of the balance loss.
        chunk: tokens that are computed at once; more than 32 are computed 32 at a time.
    """

    name = "sparse_state"
    has_gains = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        partitions: int = 4,
        top: int = 1,
        rank: int = 16,
        gate_scale: float = 16.0,
        norm_eps: float = 1e-5,
        balance_loss_weight: float = 0.01,
        chunk: int = SHORT,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, partitions=partitions, top=top, rank=rank, chunk=chunk)
        positive(gate_scale=gate_scale, norm_eps=norm_eps)
        require(top <= partitions, f"`top` is {top}; it must not exceed the `partitions` = {partitions}.")
        require(balance_loss_weight >= 0, f"`balance_loss_weight` is {balance_loss_weight}; it must not be negative.")
        dim_key = dim // (2 * heads) if dim_key is None else dim_key
        dim_value = dim // heads if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        self.heads, self.dim_key, self.dim_value, self.partitions, self.top = heads, dim_key, dim_value, partitions, top
        self.gate_scale, self.chunk = gate_scale, chunk
        self.loss_weights = LossWeights(balance=balance_loss_weight)
        keys = heads * dim_key
        self.to_q, self.to_k = (nn.Linear(dim, keys, bias=False) for _ in range(2))
        self.to_v, self.to_gate = (nn.Linear(dim, heads * dim_value, bias=False) for _ in range(2))
        self.to_own_q, self.to_own_k = (LowRank(dim, rank, keys) for _ in range(2))
        self.to_decay, self.to_own_decay = (LowRank(dim, rank, keys, bias=torch.zeros(keys)) for _ in range(2))
        self.to_route = nn.Linear(dim, partitions, bias=False)
        self.norm = MixerNorm(dim_value, norm_eps)
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        self.state_shapes |= {
            "shared": (heads, dim_key, dim_value),
            "partitions": (partitions, heads, dim_key, dim_value),
        }

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        q, k = self.to_q(x), self.to_k(x)
        shared = self._reads(q, k, self.to_decay(x), row)
        own = self._reads(q + self.to_own_q(x), k + self.to_own_k(x), self.to_own_decay(x), row)
        shares = at_least_float32(self.to_route(x)).softmax(dim=-1)
        v = split_heads(F.silu(self.to_v(x)), self.heads)
        held = None if state is None else torch.cat((state["shared"], state["partitions"].flatten(1, 2)), dim=1)
        out, held = partitioned(shared, own, v, shares, self.top, held, chunk=self.chunk)
        y = self.to_out(gated_heads(self.norm(out), self.to_gate(x), x))
        # each of its own memory, and contiguous after passes of all lengths
        left = {"shared": held[:, : self.heads], "partitions": held[:, self.heads :].unflatten(1, (-1, self.heads))}
        return y, {name: t.clone(memory_format=torch.contiguous_format) for name, t in left.items()}

    def _reads(self, q: Tensor, k: Tensor, decay: Tensor, row: Row) -> Reads:
        q, k, decay = (split_heads(t, self.heads) for t in (F.silu(q), k, F.logsigmoid(at_least_float32(decay))))
        k = row.silence_heads(at_least_float32(k).softmax(dim=-1))
        return Reads(q * self.dim_key**-0.5, k, row.silence_heads(decay / self.gate_scale))

    @property
    def has_aux_loss(self) -> bool:
        """True if the balance loss has a weight above 0."""
        return self.loss_weights.any

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        output, capture = super().run(x, layer), layer.call.capture
        if not (capture.losses or capture.routing):
            return output
        record = self.record(x, layer, choices=capture.routing)
        if isinstance(self.backward, SparseState) and not layer.call.causal and "balance" in record.losses:
            other = self.backward.record(x, layer, choices=False).losses["balance"]
            mean = (record.losses["balance"].value + other.value) / 2
            record.losses["balance"] = AuxLoss(mean, other.weight)
        return BranchOutput(output.out, record, output.carry)

    def record(self, x: Tensor, layer: LayerCall, *, choices: bool) -> RoutingRecord:
        """Return the loads of partitions and the balance loss of a pass."""
        logits = at_least_float32(self.to_route(x)).flatten(0, 1)
        weights, chosen = logits.softmax(dim=-1).topk(self.top, dim=-1)
        shape, live = (x.shape[0], x.shape[1]), layer.call.token_mask
        return record_routing(
            Routing(chosen, weights, logits),
            shape,
            live,
            _softmax,
            self.loss_weights,
            choices=choices,
            reduce_load=layer.call.capture.reduce_load,
        )

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        heads = (1 + self.partitions) * self.heads
        return linear_cost(situation, tokens, heads, self.dim_key, self.dim_value, self.chunk, True)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class SparseStateOptions:
    partitions: int | None = opt(None, "states of a sparse_state besides the shared one")
    top: int | None = opt(None, "partitions that each token of a sparse_state uses")
    balance_loss_weight: float | None = opt(None, "weight of the loss that balances partitions of a sparse_state")


FEATURE = Feature(
    name="sparse_state",
    group="mixer",
    slot="mixer",
    options=SparseStateOptions,
    build=SparseState,
    summary="many states, of which each token writes and reads a few",
    paper="2507.16577",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "sparse_state", "mixer_partitions": 3, "mixer_top": 2, "mixer_rank": 3},
        {"mixer": "sparse_state", "layer_period": "ma", "mixer_dim_key": 3, "mixer_gate_scale": 4.0},
    ),
)
