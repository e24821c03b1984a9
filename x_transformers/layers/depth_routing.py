"""Mixture of depths (2404.02258): tokens that pass routed blocks by.

    s_t = x_t . u + c        y_t = x_t + sigmoid(s_t) (block(x)_t - x_t) for t in M, else x_t

M are the chosen tokens, which see only chosen ones within the block. By "threshold" a token is chosen if its score is
positive, so that the choice depends on nothing else; by "topk" the tokens of a row with the largest scores are, which
later tokens of the row decide too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, StateDictError
from x_transformers.forward_pass.call import Call, LayerCall, Memo
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.layers.execution_order import LayerSequence
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt, require
from x_transformers.routing.base import AuxLoss, RoutingRecord
from x_transformers.routing.losses import mean_over_live

METHODS = ("threshold", "topk", "topk_training")
CHOSEN = "chosen"
"""Name of the stream of the cache that says which tokens a routed attention may see."""


@dataclass(frozen=True, kw_only=True)
class DepthRoutingOptions:
    depth_routing: str | None = opt(
        None,
        'routed blocks run a part of the tokens: "threshold", those with a positive score; "topk", the best of a row '
        '(encoders); "topk_training", the best of a row in training only (causal stacks)',
    )
    depth_routing_share: float = opt(0.125, "share of the tokens that routed blocks are to run")
    depth_routing_every: int = opt(2, "one of this number of blocks is routed, the last of them")
    depth_routing_loss_weight: float = opt(
        0.01, "weight of the loss that drives the share of positive scores to `depth_routing_share`"
    )

    def __post_init__(self) -> None:
        method, share = self.depth_routing, self.depth_routing_share
        require(
            method is None or method in METHODS,
            f"`depth_routing` is {method!r}; it must be one of {', '.join(map(repr, METHODS))}, or None.",
        )
        require(0 < share <= 1, f"`depth_routing_share` is {share}; it must be above 0, and at most 1.")
        every, weight = self.depth_routing_every, self.depth_routing_loss_weight
        require(every >= 1, f"`depth_routing_every` is {every}; it must be at least 1.")
        require(weight >= 0, f"`depth_routing_loss_weight` is {weight}; it must not be negative.")


class DepthRouter(ReadsReference, nn.Module):
    """Choice of the tokens that a block runs.

    Args:
        dim: width of the residual stream.
        method: "threshold", "topk" or "topk_training".
        share: share of the tokens that are to be chosen.
        loss_weight: weight of the loss.
    """

    def __init__(self, dim: int, method: str, share: float, loss_weight: float) -> None:
        super().__init__()
        self.method, self.share, self.loss_weight = method, share, loss_weight
        # whole numbers, so that rows choose as many tokens in a batch as by themselves
        fraction = Fraction(share).limit_denominator(1_000_000)
        self.ratio = fraction.numerator, fraction.denominator
        self.weight = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def ranks(self) -> bool:
        """True if tokens are chosen by comparison with the other ones of their row."""
        return self.method == "topk" or (self.method == "topk_training" and self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `(b, n)` of `x (b, n, D)`, at least in float32, whatever autocast is."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
            return F.linear(at_least_float32(x).to(weight.dtype), weight, bias).squeeze(-1)

    def most(self, count: Any) -> Any:
        """Return the number of tokens to choose among `count`, a number or a tensor: the share of them, rounded up."""
        share, of = self.ratio
        return (count * share + of - 1) // of

    def best(self, scores: Tensor, live: Tensor | None) -> Tensor:
        """Return `(b, n)` bool, the tokens of each row with the largest scores; the first ones among equals.

        Args:
            scores: `(b, n)`.
            live: `(b, n)` bool, the tokens that may be chosen; None for all.
        """
        n = scores.shape[-1]
        if live is not None:
            scores = scores.masked_fill(~live, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(n, device=scores.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        most = self.most(n) if live is None else self.most(live.sum(dim=-1, keepdim=True))
        return rank < most

    def choose(self, scores: Tensor, live: Tensor | None, *, ranks: bool) -> Tensor:
        """Return `(b, n)` bool, the chosen tokens.

        Args:
            scores: `(b, n)`.
            live: `(b, n)` bool, the tokens that may be chosen; None for all.
            ranks: choose by comparison with the other tokens of the row.
        """
        chosen = self.best(scores, live) if ranks else scores > 0
        return chosen if live is None else chosen & live

    def record(
        self, x: Tensor, scores: Tensor, chosen: Tensor, live: Tensor | None, *, losses: bool, choices: bool
    ) -> RoutingRecord:
        """Return the share of chosen tokens, and the loss: the cross-entropy with the choice of the best of each row.

        Args:
            x: `(b, n, D)`, which the loss does not change.
            scores, chosen: `(b, n)`.
            live: `(b, n)` bool, the tokens that count; None for all.
            losses: compute the loss.
            choices: record the choice itself.
        """
        found: dict[str, AuxLoss] = {}
        if losses and self.loss_weight > 0:
            own = self(x.detach())
            target = self.best(own.detach(), live).to(own.dtype)
            each = F.binary_cross_entropy_with_logits(own, target, reduction="none")
            found["depth_rate"] = AuxLoss(mean_over_live(each.unsqueeze(-1), live).squeeze(-1), self.loss_weight)
        gates = scores.sigmoid().unsqueeze(-1)
        return RoutingRecord(
            mean_over_live(chosen.unsqueeze(-1).to(scores.dtype), live),
            mean_over_live(gates, live),
            found,
            None,
            gates.detach() if choices else None,
            scores.detach().unsqueeze(-1) if choices else None,
            chosen=chosen if choices else None,
        )

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no `depth_routing`; a model with it cannot be exported.")


class RoutedTokens:
    """The tokens that a routed block runs, while it runs.

    Args:
        chosen: `(b, n)` bool.
        gates: `(b, n)` factors of what the block adds.
        router: which chose them.
    """

    def __init__(self, chosen: Tensor, gates: Tensor, router: DepthRouter) -> None:
        self.chosen, self.gates, self.router = chosen, gates, router

    def hide_others(self, layer: LayerCall) -> None:
        """Hide the keys of tokens that are not chosen, those of memory and of the cache included.

        Args:
            layer: call of a self-attention, whose keys become others.
        """
        mask = self.chosen
        if layer.entry is not None:
            # the others keep their slots, so that windows and positions of later tokens are what they were
            ones = mask.to(self.gates.dtype)
            # with the graph of the gates, as keys have theirs: buffers of a record are not written in training
            ones = ones + (self.gates - self.gates.detach()) if self.gates.requires_grad else ones
            mask = layer.entry.grow(CHOSEN, ones[:, None, :, None])[:, 0, :, 0] > 0.5
        if layer.memory is not None:
            mask = torch.cat((self.router(layer.memory) > 0, mask), dim=-1)
        keys, fresh = layer.keys, layer.fresh
        layer.keys = replace(keys, token_mask=mask if keys.token_mask is None else keys.token_mask & mask)
        layer.fresh = layer.keys if fresh is keys else fresh


def call_of(call: Call, chosen: Tensor) -> Call:
    """Return the pass as a routed block sees it: the other tokens are hidden, as padding is.

    Args:
        call: the pass.
        chosen: `(b, n)` bool.
    """
    query, keys = call.query, call.keys
    shown = chosen if query.token_mask is None else query.token_mask & chosen
    hidden = replace(query, token_mask=shown)
    if keys is query:
        keys = hidden
    else:
        full = keys.token_mask
        if full is None:
            full = torch.ones(chosen.shape[0], keys.length, dtype=torch.bool, device=chosen.device)
        columns = keys.find(query.index)
        keys = replace(keys, token_mask=full.index_copy(1, columns, full[:, columns] & chosen))
    return replace(call, query=hidden, keys=keys, memo=Memo(forgets=call.memo.forgets))


def build_depth_routers(
    options: DepthRoutingOptions, dim: int, sequence: LayerSequence, branches: Sequence[Any], *, order_seen: str | None
) -> nn.ModuleDict:
    """Build the routers of a stack, by the number of the built block, counted from 0.

    Args:
        options: of the stack.
        dim: width of the residual stream.
        sequence: of its sublayers.
        branches: the sublayers.
        order_seen: "causal", "prefix" (a PrefixDecoder) or None for a stack whose tokens see all others.

    Raises:
        ConfigError: if tokens cannot pass the blocks by, or no block is routed.
    """
    method, every = options.depth_routing, options.depth_routing_every
    assert method is not None
    if method == "topk" and order_seen is not None:
        raise ConfigError(
            '`depth_routing = "topk"` chooses the best tokens of a whole row, which tokens of a causal stack or a '
            'PrefixDecoder must not know; use an Encoder, or `depth_routing = "threshold"`.'
        )
    if method == "topk_training" and order_seen != "causal":
        raise ConfigError(
            '`depth_routing = "topk_training"` is for causal stacks, which cannot choose the best tokens of a row in '
            'evaluation; use "topk" in an Encoder, and "threshold" in a PrefixDecoder.'
        )
    check_whole_blocks(sequence.order, sequence.block)
    blocks = len(sequence.kinds) // sequence.block
    numbers = range(every - 1, blocks, every)
    if not numbers:
        raise ConfigError(
            f"`depth_routing_every` is {every}, but the stack builds {blocks} blocks, so that none is routed; set it "
            f"to at most {blocks}."
        )
    for number in numbers:
        for branch in branches[number * sequence.block : (number + 1) * sequence.block]:
            if branch.running or branch.shift is not None or branch.fn.state_names or "hybrid" in branch.fn.features:
                raise ConfigError(
                    f"`depth_routing` lets tokens pass block {number + 1} by, but a part of it that mixes tokens in "
                    "their order (`shift_tokens`, `ff_rwkv`, a token mixer, `attn_hybrid_module`, "
                    "`mv_split_residual`) would skip them; drop that part, or route other blocks by "
                    "`depth_routing_every`."
                )
    routers = (
        DepthRouter(dim, method, options.depth_routing_share, options.depth_routing_loss_weight) for _ in numbers
    )
    return nn.ModuleDict({str(number): router for number, router in zip(numbers, routers, strict=True)})


def check_whole_blocks(order: Sequence[int], size: int) -> None:
    """Raise a `ConfigError` unless an order of execution runs blocks as they were built.

    Args:
        order: indices of built sublayers.
        size: number of sublayers of a block.
    """
    for first in range(0, len(order), size):
        block = tuple(order[first : first + size])
        begins = block[0] - block[0] % size
        if block != tuple(range(begins, begins + size)):
            raise ConfigError(
                f"`depth_routing` chooses the tokens of whole blocks of {size} sublayers, but sublayers {block} are to "
                "run as one; change `layers_execute_order`."
            )


def routed_loss(routers: nn.ModuleDict | None) -> bool:
    """Return True if routers of a stack have a loss."""
    every = () if routers is None else routers.values()
    return any(isinstance(each, DepthRouter) and each.loss_weight > 0 for each in every)


_READERS: Mapping[str, str] = {
    "unet_skips": "unet_skips",
    "lime": "integrate_layers",
    "aggregated_residuals": "attn_aggregated_residuals",
}
_CONNECTIONS: Mapping[str, str] = {
    "residual_streams": "num_residual_streams",
    "resi_dual": "resi_dual",
    "mv_split_residual": "mv_split_residual",
    "path_scales": "path_scales",
}

FEATURE = Feature(
    name="depth_routing",
    group="stack",
    slot="depth routing",
    options=DepthRoutingOptions,
    enabled=lambda options: options.depth_routing is not None,
    summary="tokens pass routed blocks by",
    paper="2404.02258",
    refuses=(
        *(
            Rule(
                when=lambda o, other=other: o.on(other),
                why=f"`{keyword}` would read inputs of blocks that tokens passed by (`depth_routing`), which had none "
                "of them; drop one of the two.",
            )
            for other, keyword in _READERS.items()
        ),
        *(
            Rule(
                when=lambda o, other=other: o.on(other),
                why=f"`depth_routing` adds a share of what a block does to one stream, and `{keyword}` has no such "
                "stream; drop one of the two.",
            )
            for other, keyword in _CONNECTIONS.items()
        ),
        Rule(
            when=lambda o: o["residual_scores"].residual_attn or o["residual_scores"].cross_residual_attn,
            why="`residual_attn` and `cross_residual_attn` add the scores of the attention before, which tokens that "
            "passed its block by (`depth_routing`) do not have; drop one of the two.",
        ),
        Rule(
            when=lambda o: o.on("context_dropout") and o.on("value_residual"),
            why="`cross_attn_tokens_dropout` leaves all cross-attentions the same part of the context with "
            "`add_value_residual`, but routed blocks (`depth_routing`) draw their own; drop one of the three.",
        ),
    ),
    warns=(
        Rule(
            when=lambda o: o["depth_routing"].depth_routing == "topk_training",
            why='with `depth_routing = "topk_training"`, which tokens run depends on later ones in training, and in '
            'evaluation on their scores only; "threshold" is one rule for both.',
        ),
    ),
    unpackable="a routed block hides keys of single tokens, which packed rows do not support",
    exempt={
        "precision": "a rounded score may choose other tokens",
        "export": "the reference has no depth routing",
    },
    examples=(
        {"depth_routing": "threshold"},
        {"depth_routing": "threshold", "depth_routing_every": 1, "depth_routing_share": 0.5},
        {"depth_routing": "threshold", "depth_routing_loss_weight": 0.0, "macaron": True},
    ),
)
