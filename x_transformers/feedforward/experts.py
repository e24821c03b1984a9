"""Mixture of experts: each token uses k of E feedforwards (2401.04088), and perhaps one that all use (2401.06066)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, Faults, InputError, ShapeError, StateDictError
from x_transformers.feedforward import feedforward, routing_options
from x_transformers.feedforward.expert_networks import ExpertNetworks, inner_width
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.forward_pass.arguments import explain_failure
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchCost
from x_transformers.modules.inference import PreparesForInference
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Schema
from x_transformers.options.signatures import parameter, show_keywords
from x_transformers.options.values import shown
from x_transformers.routing.base import Routing, RoutingRecord
from x_transformers.routing.dispatch import Dispatch, sort_by_expert, sum_copies, take_copies
from x_transformers.routing.exchange import Exchange
from x_transformers.routing.losses import record_routing
from x_transformers.routing.products import choose_product, grouped_product
from x_transformers.routing.routers import KeyRouter, mean_keys

FEATURES = (*feedforward.FEATURES, routing_options.FEATURE)
SCHEMA = Schema(FEATURES)
"""Keywords of feedforwards of a stack, which are mixtures of experts if `experts` is a number."""

OWN = frozenset(name for name, feature in SCHEMA.owner.items() if feature is routing_options.FEATURE)
"""The keywords that only experts have."""


class Experts(Configured, PreparesForInference, ReadsReference, ExpertNetworks):
    """Mixture of experts, each a feedforward network f as `FeedForward` has them.

        y = sum over the chosen e of w_e f_e(x) + sigmoid(a . x) f_shared(x)

    The router chooses k experts for each token and their weights w. Every token gets its k experts, whatever other
    tokens choose: no token is dropped, so that rows and batches do not depend on each other. Experts share activations
    and the norm after these. The factor sigmoid(a . x) is there with `shared_gate`.

    Args:
        dim: width of the input.
        dim_out: width of the output; default `dim`.
        mult: expansion of one expert; its inner width is `int(dim * mult)`.
        experts: number E of experts.
        options: further keywords, those of `FeedForward` included. `no_bias` here means no bias at all.

    Attributes:
        up: `(E, inner, D)` matrices, in a gated network `(E, 2 inner, D)`, of the gated value first, then of the gate.
        down: `(E, dim_out, inner)` matrices.
        loss_weights: weights of the auxiliary losses.
        exchange: what the processes exchange that divide the experts among them; None if this one has all. See
            `x_transformers.training.expert_parallel.shard_experts`.

    Raises:
        ConfigError: if keywords are unknown or values are out of range; the message lists all of them.
    """

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, **options: Any) -> None:
        super().__init__()
        faults = Faults()
        parsed = SCHEMA.parse({"dim_out": dim_out, "mult": mult, **options}, faults)
        SCHEMA.check_choices(parsed, faults)
        SCHEMA.check_rules(parsed, parsed, faults)
        faults.raise_if_any("Experts")
        core, glu, own = parsed["feedforward"], parsed["glu"], parsed["experts"]
        if own.experts is None:
            raise ConfigError("Experts: `experts` is None; it must be the number of experts, or use a FeedForward.")
        inner_width(dim, core.mult)
        self.topk, self.loss_weights = own.experts_topk, own.loss_weights
        self.exchange: Exchange | None = None
        self.features = tuple(feature.name for feature in parsed.enabled())
        self.router = own.build_router(dim)
        self.build_networks(parsed, dim, own.experts)
        self.shared = self.shared_gate = None
        if own.shared_mult > 0:
            given = {name: value for name, value in options.items() if name not in OWN}
            bare = {"glu_no_bias": not self.biased} if glu.glu else {}
            given |= {"dim_out": dim_out, "mult": own.shared_mult, "sublayer_dropout": 0.0, **bare}
            self.shared = FeedForward(dim, **given)
            self.shared_gate = nn.Linear(dim, 1, bias=False) if own.shared_gate else None

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Map `(b, n, dim)` to `(b, n, dim_out)` as one sublayer of a pass.

        Args:
            x: `(b, n, dim)` input.
            layer: the call of the sublayer.
        """
        out = self.forward(x, layer=layer)
        assert isinstance(out, BranchOutput)
        return out

    @takes_no_more
    def forward(
        self, x: Tensor, deep_embed: Tensor | None = None, *, layer: LayerCall | None = None, **unknown: Any
    ) -> Tensor | BranchOutput:
        """Apply the chosen experts to each token.

        Args:
            x: `(..., dim)` input.
            deep_embed: `(..., dim_out)` factor on the output, or None.
            layer: the call of a sublayer, instead of `deep_embed`.

        Returns:
            `(..., dim_out)`; with `layer`, a `BranchOutput`, whose record is a `RoutingRecord` if one was requested.
        """
        if unknown:
            check_names(self, Experts.forward, unknown)
        if layer is not None:
            deep_embed = layer.deep_embed
        else:
            self._check_input(x)
        tokens = x.reshape(-1, self.dim)
        try:
            routing = self.route(tokens)
            out = self.mix(tokens, routing)
        except RuntimeError as error:
            explain_failure(error, self.up, {"x": x})
            raise
        if self.shared is not None:
            shared = self.shared(tokens)
            out = out + (shared if self.shared_gate is None else shared * self.shared_gate(tokens).sigmoid())
        out = out.unflatten(0, x.shape[:-1]) if x.ndim != 1 else out.squeeze(0)
        if self.sublayer_dropout:
            out = F.dropout(out, self.sublayer_dropout, self.training)
        if deep_embed is not None:
            out = out * deep_embed
        return out if layer is None else BranchOutput(out, self._record(routing, x, layer), layer.carry)

    def route(self, tokens: Tensor) -> Routing:
        """Choose experts for tokens `(N, dim)`."""
        if not isinstance(self.router, KeyRouter):
            routing: Routing = self.router(tokens)
            return routing
        return self.router(tokens, self._keys() if self.ready is None else self.ready)

    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sums `(N, dim_out)` of what the chosen experts make of tokens `(N, dim)`."""
        dispatch = sort_by_expert(routing.experts, self.experts)
        rows = take_copies(tokens, dispatch)
        rows = self.compute(rows, dispatch) if self.exchange is None else self.exchange(rows, dispatch, self.compute)
        return sum_copies(rows, routing.weights, dispatch).to(rows.dtype)

    def compute(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Apply to each row the network of its expert, one of those that this process has.

        Args:
            rows: `(R, dim)` copies of tokens, sorted by expert.
            dispatch: where the rows of each expert end.

        Returns:
            `(R, dim_out)`.
        """

        def apply_maps(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
            matrices, biases = self._own((weight, bias), x.dtype)
            return _apply_maps(x, matrices, biases, dispatch)

        (scale,) = self._own((self.gate_scale,), rows.dtype)
        scale = None if scale is None else F.embedding(dispatch.experts, scale)
        return self.apply_networks(rows, apply_maps, scale)

    def _own(self, stacks: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
        """Return the parts of stacks that this process has, for rows of a dtype."""
        return stacks if self.exchange is None else self.exchange.own(stacks, dtype)

    def _record(self, routing: Routing, x: Tensor, layer: LayerCall) -> RoutingRecord | None:
        """Return the loads, and the losses with their gradients, if the pass records them."""
        capture = layer.call.capture
        if not (capture.losses or capture.routing):
            return None
        shape, live = (x.shape[0], x.shape[1]), layer.call.token_mask
        return record_routing(
            routing,
            shape,
            live,
            self.router.probabilities,
            self.loss_weights,
            choices=capture.routing,
            reduce_load=capture.reduce_load,
        )

    def _keys(self) -> Tensor:
        """Return `(E, dim)`, the means of the rows that the activation sees: those of the gates, if there are."""
        return self._mean_rows(self.up) if self.exchange is None else self.exchange.of_all(self.up, self._mean_rows)

    def _mean_rows(self, up: Tensor) -> Tensor:
        return mean_keys(up[:, self.inner :] if self.glu else up)

    def prepare(self) -> Tensor | None:
        """Return the keys of the experts, if the router reads them."""
        if self.exchange is not None and self.exchange.size > 1:
            # processes that generate different numbers of tokens would wait for each other
            raise InputError(
                f"generation needs all experts, and those of this model are divided among {self.exchange.size} "
                "processes; load what `gathered` returns into a model of the same configuration."
            )
        return self._keys() if isinstance(self.router, KeyRouter) else None

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"the input is {shown(x)}; it must be a floating tensor, (..., {self.dim}).")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (..., {self.dim}).")

    @property
    def has_aux_loss(self) -> bool:
        """True if an auxiliary loss has a weight above 0."""
        return self.loss_weights.any

    @property
    def keeps_documents_apart(self) -> bool:
        """True: every token is mapped by itself."""
        return True

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize: each of the stacks, and those of the shared network."""
        return super().muon_parameters() + ([] if self.shared is None else self.shared.muon_parameters())

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        device, widths = torch.device(situation.device), (self.dim, self.inner, self.up.shape[1], self.down.shape[1])
        divided = 1 if self.exchange is None else self.exchange.size
        product = choose_product(device, situation.dtype, self.experts // divided, widths)
        stacks = self.stacks
        of_all = sum(t.numel() for t in stacks)
        active = sum(p.numel() for p in self.parameters()) - of_all + of_all // self.experts * self.topk
        matrices = (self.up.numel() + self.down.numel()) // self.experts * self.topk
        others = sum(p.numel() for p in self.parameters() if p.ndim == 2 and not any(p is t for t in stacks))
        among = f" in {divided} processes" if divided > 1 else ""
        words = f"{self.experts} experts of {self.inner}{among}, {self.topk} used; {product.why}"
        return BranchCost(product.name, words, 2 * (matrices + others), active)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no experts; a model with `ff_experts` cannot be exported.")


def _apply_maps(rows: Tensor, weight: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Apply to each row the map of its expert; under autocast in its dtype, as `F.linear` does."""
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return grouped_product(rows, weight, bias, dispatch.ends, dispatch.experts)


show_keywords(Experts, [(SCHEMA, "")], [parameter("dim", positional=True)])
