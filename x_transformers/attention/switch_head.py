"""SwitchHead: a head has several matrices for values and outputs, of which each token uses a few (2312.07987).

Queries and keys, and with them the number of attention matrices, are those of few heads; the values are as many as
those of many.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, MakeHeads
from x_transformers.attention.head_maps import HeadMaps, HeadOutput
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.modules.branch_function import BranchCost
from x_transformers.options.schema import Feature, Rule, at_least, opt, require
from x_transformers.routing.base import Routing, RoutingRecord
from x_transformers.routing.losses import LossWeights, record_routing
from x_transformers.routing.routers import HeadRouter


@dataclass(frozen=True, kw_only=True)
class SwitchOptions:
    switch_experts: int | None = opt(
        None, "number of matrices of each head for values and for outputs; None: one, which all tokens use"
    )
    switch_topk: int = opt(2, "number of matrices of a head that each token uses")
    switch_queries_keys: bool = opt(
        False, "as many matrices for queries and keys; queries choose as outputs do, and keys as values do"
    )
    switch_one_selection: bool = opt(
        False, "values choose as outputs do; self-attention only, with as many kv heads as heads"
    )
    switch_expert_dropout: float = opt(0.0, "probability in training that a token cannot choose a matrix of a head")
    switch_entropy_weight: float = opt(
        0.0, "weight of minus the entropy of the mean probabilities of a batch, a mean over heads"
    )

    def __post_init__(self) -> None:
        experts, topk = self.switch_experts, self.switch_topk
        at_least(1, switch_experts=experts, switch_topk=topk)
        require(
            experts is None or topk <= experts,
            f"`switch_topk` is {topk}; it must lie between 1 and the `switch_experts` = {experts}.",
        )
        dropout, weight = self.switch_expert_dropout, self.switch_entropy_weight
        require(0 <= dropout < 1, f"`switch_expert_dropout` is {dropout}; it must lie in [0, 1).")
        require(weight >= 0, f"`switch_entropy_weight` is {weight}; it must not be negative.")

    def maps_to_heads(self, bias: bool) -> MakeHeads | None:
        """Return what builds maps to heads with several matrices; None if there is one."""
        if self.switch_experts is None:
            return None
        return functools.partial(HeadMaps, experts=self.switch_experts, bias=bias)

    def build(self, shape: AttentionShape, dim_context: int) -> HeadSwitch | None:
        """Build the choice of matrices, if there are several.

        Args:
            shape: of the attention.
            dim_context: width of the source of values.

        Raises:
            ConfigError: if values, with heads of their own, have to choose as outputs do.
        """
        if self.switch_experts is None:
            return None
        require(
            shape.kv_heads == shape.heads or not self.switch_one_selection,
            f"`switch_one_selection` makes one choice for each head, and there are {shape.heads} heads of outputs but "
            f"{shape.kv_heads} of values; drop it, or `kv_heads`.",
        )
        return HeadSwitch(
            shape,
            None if self.switch_one_selection else dim_context,
            self.switch_experts,
            self.switch_topk,
            dropout=self.switch_expert_dropout,
            entropy_weight=self.switch_entropy_weight,
        )


class Selections(NamedTuple):
    """Choices of one pass.

    Attributes:
        values: of the `b j` new tokens that are attended to, recurrent memory included, for their values, and perhaps
            keys; None if these are in the cache of a context.
        outputs: of the `b i` tokens that attend, for their outputs, and perhaps queries.
        records: of the routers that ran, if the pass records them.
    """

    values: Routing | None
    outputs: Routing
    records: tuple[RoutingRecord, ...]


class HeadSwitch(nn.Module):
    """Choice of matrices for the values and for the outputs of each head.

    Args:
        shape: of the attention.
        dim_context: width of the source of values; None: they choose as outputs do.
        experts: number E of matrices of a head.
        topk: number of them that a token uses.
        dropout: probability in training that a token cannot choose a matrix.
        entropy_weight: weight of the loss that balances them.
    """

    def __init__(
        self,
        shape: AttentionShape,
        dim_context: int | None,
        experts: int,
        topk: int,
        *,
        dropout: float = 0.0,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.experts, self.topk = experts, topk
        self.loss_weights = LossWeights(router_entropy=entropy_weight)
        self.values = None
        if dim_context is not None:
            self.values = HeadRouter(dim_context, shape.kv_heads, experts, topk, dropout)
        self.outputs = HeadRouter(shape.dim, shape.heads, experts, topk, dropout)

    def forward(self, xq: Tensor, xv: Tensor | None, layer: LayerCall) -> Selections:
        """Choose matrices.

        Args:
            xq: `(b, i, D)` input of the queries.
            xv: `(b, j, Dc)` source of the values, recurrent memory included; None if the values are cached.
            layer: the sublayer's call.

        Raises:
            InputError: if values choose as outputs do, and come from a context.
        """
        if self.values is not None:
            of_outputs = self.outputs(xq.flatten(0, 1))
            of_values = None if xv is None else self.values(xv.flatten(0, 1))
        elif layer.context is not None:
            raise InputError(
                "`switch_one_selection` chooses for values and outputs of the same tokens, and the values of a "
                "`context` are of others; build this attention without it."
            )
        else:
            whole = layer.with_memory(xq)
            of_values = of_outputs = self.outputs(whole.flatten(0, 1))
            if whole is not xq:
                rows, columns = whole.shape[:2]
                new = (t.unflatten(0, (rows, columns))[:, columns - xq.shape[1] :].flatten(0, 1) for t in of_values)
                of_outputs = Routing(*new)
        return Selections(of_values, of_outputs, self._records(xq, xv, of_values, of_outputs, layer))

    def _records(
        self, xq: Tensor, xv: Tensor | None, of_values: Routing | None, of_outputs: Routing, layer: LayerCall
    ) -> tuple[RoutingRecord, ...]:
        """Return the loads, and the losses with their gradients, if the pass records them."""
        capture = layer.call.capture
        if not (capture.losses or capture.routing):
            return ()
        ran = []
        if xv is not None and of_values is not None:
            maps = "values and outputs" if self.values is None else "values"
            ran.append((maps, of_values, xv.shape, layer.fresh_token_mask))
        if self.values is not None:
            ran.append(("outputs", of_outputs, xq.shape, layer.call.token_mask))
        records = []
        for maps, routing, (rows, columns, _), live in ran:
            probabilities = self.outputs.probabilities
            weights, choices = self.loss_weights, capture.routing
            record = record_routing(routing, (rows, columns), live, probabilities, weights, choices=choices)
            record.maps = maps
            records.append(record)
        return tuple(records)

    def cost(self, attention: nn.Module, cost: BranchCost) -> BranchCost:
        """Return the cost of an attention, with its maps that are mixtures.

        Args:
            attention: the attention.
            cost: without them.
        """
        # a set, since modules with second names are listed twice
        stacks = {each.weight for each in attention.modules() if isinstance(each, (HeadMaps, HeadOutput))}
        of_all = sum(stack.numel() for stack in stacks)
        used = of_all // self.experts * self.topk
        active = sum(p.numel() for p in attention.parameters()) - of_all + used
        maps = "values and outputs" if len(stacks) == 2 else "all maps"
        words = f"{cost.why}; {self.experts} matrices a head for {maps}, {self.topk} used"
        return BranchCost(cost.backend, words, cost.flops + 2 * used, active)


def _idle(options: SwitchOptions) -> Iterator[str]:
    """Yield the keywords that change nothing with the others."""
    if options.switch_topk == options.switch_experts:
        yield "switch_expert_dropout"


_PAIRED = "drop one of them."
_SMALL: dict[str, Any] = {"attn_switch_experts": 3}

FEATURE = Feature(
    name="switch_head",
    group="attn",
    slot="projection",
    options=SwitchOptions,
    enabled=lambda options: options.switch_experts is not None,
    idle=_idle,
    summary="maps of each head that are mixtures of a few matrices",
    paper="2312.07987",
    refuses=(
        Rule(
            when=lambda o: o["latent"].use_latent_kv,
            why="`switch_experts` chooses the matrices of values by token, and with `use_latent_kv` values come from a "
            f"latent, not from tokens; {_PAIRED}",
        ),
        Rule(
            when=lambda o: o["on_attn"].on_attn,
            why=f"`switch_experts` makes the output projection a mixture, and `on_attn` gates a plain one; {_PAIRED}",
        ),
        Rule(
            when=lambda o: o["attention_output"].project_out is False,
            why="`switch_experts` makes the output projection a mixture, and `project_out = False` leaves it out; "
            f"{_PAIRED}",
        ),
        Rule(
            when=lambda o: o.is_cross_attention and o["switch_head"].switch_one_selection,
            why="`switch_one_selection` chooses for values and outputs of the same tokens, and in cross-attention "
            "values are of the context; set it to False there.",
        ),
    ),
    exempt={"precision": "a rounded score may choose another matrix", "export": "the reference has no such maps"},
    examples=(
        _SMALL,
        {"attn_switch_experts": 4, "attn_switch_topk": 1, "attn_switch_queries_keys": True, "attn_kv_heads": 2},
        {
            **_SMALL,
            "attn_switch_one_selection": True,
            "attn_switch_queries_keys": True,
            "attn_switch_expert_dropout": 0.3,
            "attn_switch_entropy_weight": 0.1,
        },
        {**_SMALL, "attn_one_kv_head": True, "attn_qkv_bias": True, "attn_out_bias": True, "attn_num_mem_kv": 1},
    ),
)
