"""Keywords of feedforwards that are mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from x_transformers.options.schema import Feature, at_least, opt, require
from x_transformers.routing.losses import LossWeights
from x_transformers.routing.routers import KeyRouter, Router

BALANCE = 0.01
"""Default weight of the balance loss."""


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    experts: int | None = opt(None, "number of experts; None: a plain feedforward. `mult` is the width of one expert")
    experts_topk: int = opt(2, "number of experts that each token uses")
    shared_mult: float = opt(0.0, "width of a feedforward that all tokens use besides the experts; 0: none")
    shared_gate: bool = opt(False, "multiply its output by the sigmoid of a learned product with the token")
    router: Literal["softmax", "sigmoid", "keys"] = opt(
        "softmax", "scores of experts; keys: the mean of an expert's own rows, without parameters (2310.10908)"
    )
    router_normalize: bool | None = opt(
        None, "divide the weights of the chosen experts by their sum; None: if topk > 1"
    )
    router_scale: float = opt(1.0, "factor of the weights of the chosen experts")
    router_bias: bool = opt(False, "a learned bias of the router's logits")
    router_groups: int = opt(1, "number of groups of experts (2412.19437)")
    router_groups_topk: int = opt(1, "number of groups whose experts a token may choose from")
    balance_bias: bool = opt(
        False, "a bias of the choice, which only `balance_experts_` of a model changes (2408.15664)"
    )
    balance_loss_weight: float | None = opt(
        None, f"weight of the balance loss; None: {BALANCE}, and 0 with `balance_bias` or the router keys (2101.03961)"
    )
    balance_loss_per_row: bool = opt(False, "balance each row by itself; otherwise all rows of a batch together")
    router_z_loss_weight: float = opt(0.0, "weight of the mean squared logsumexp of the router's logits (2202.08906)")
    router_entropy_weight: float = opt(
        0.0, "weight of minus the entropy of the mean probabilities of a batch (2310.10837)"
    )
    expert_dropout: float = opt(0.0, "probability in training that a token cannot choose an expert (2310.10837)")

    def __post_init__(self) -> None:
        at_least(1, experts=self.experts, experts_topk=self.experts_topk, router_groups=self.router_groups)
        at_least(1, router_groups_topk=self.router_groups_topk)
        for name in ("shared_mult", "balance_loss_weight", "router_z_loss_weight", "router_entropy_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"`{name}` is {value}; it must not be negative.")
        require(self.router_scale > 0, f"`router_scale` is {self.router_scale}; it must be positive.")
        require(0 <= self.expert_dropout < 1, f"`expert_dropout` is {self.expert_dropout}; it must lie in [0, 1).")
        if self.experts is None:
            return
        topk = self.experts_topk
        require(
            topk <= self.experts,
            f"`experts_topk` is {topk}; it must lie between 1 and the `experts` = {self.experts}.",
        )
        if self.router == "keys":
            trained = [name for name in _LOSSES if getattr(self, name)]
            named = f"`{trained[0]}`" if trained else ""
            require(not trained, f"{named} balances a router, but `router` = 'keys' has nothing to train; drop it.")
            return
        require(
            not (topk == 1 and self.router_normalize),
            "`experts_topk` = 1 with `router_normalize` = True weights the one expert by 1, so that the router would "
            "learn nothing; leave `router_normalize` at None.",
        )
        self._check_groups(self.experts)

    def _check_groups(self, experts: int) -> None:
        groups, stay = self.router_groups, self.router_groups_topk
        require(
            stay <= groups,
            f"`router_groups_topk` is {stay}; it must lie between 1 and the `router_groups` = {groups}.",
        )
        require(
            experts % groups == 0,
            f"`router_groups` is {groups}, which does not divide the `experts` = {experts}; choose a divisor.",
        )
        size = experts // groups
        require(
            groups == 1 or size > 1,
            f"`router_groups` is {groups}, so that each group has one expert only; a group is valued by its two best "
            "experts. Use fewer groups.",
        )
        require(
            self.experts_topk <= stay * size,
            f"`experts_topk` is {self.experts_topk}, but the {stay} groups of `router_groups_topk` hold "
            f"{stay * size} experts together; let more groups stay, or choose fewer experts.",
        )

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the auxiliary losses."""
        balance = self.balance_loss_weight
        if balance is None:
            balance = 0.0 if self.balance_bias or self.router == "keys" else BALANCE
        return LossWeights(balance, self.balance_loss_per_row, self.router_z_loss_weight, self.router_entropy_weight)

    @property
    def normalizes(self) -> bool:
        """True if the weights of the chosen experts are divided by their sum."""
        return self.experts_topk > 1 if self.router_normalize is None else self.router_normalize

    def build_router(self, dim: int) -> Router | KeyRouter:
        """Build the router of tokens of a width."""
        assert self.experts is not None
        if self.router == "keys":
            return KeyRouter(self.experts_topk, self.router_scale, self.expert_dropout)
        return Router(
            dim,
            self.experts,
            self.experts_topk,
            self.router,
            normalize=self.normalizes,
            scale=self.router_scale,
            bias=self.router_bias,
            groups=self.router_groups,
            groups_topk=self.router_groups_topk,
            balance_bias=self.balance_bias,
            dropout=self.expert_dropout,
        )


_LOSSES = ("balance_bias", "balance_loss_weight", "router_z_loss_weight", "router_entropy_weight")


def _idle(options: ExpertOptions) -> Iterator[str]:
    """Yield the keywords that change nothing with the others."""
    if options.router == "keys":
        yield from ("router_normalize", "router_bias", "router_groups", "router_groups_topk")
    if not options.loss_weights.balance:
        yield "balance_loss_per_row"
    if not options.shared_mult:
        yield "shared_gate"
    if options.experts_topk == options.experts:
        yield "expert_dropout"


PRECISION = "a rounded score may choose another expert"
_SMALL: dict[str, Any] = {"ff_experts": 4, "ff_mult": 1}

FEATURE = Feature(
    name="experts",
    group="ff",
    slot="feedforward",
    choice="network of experts",
    options=ExpertOptions,
    enabled=lambda options: options.experts is not None,
    idle=_idle,
    summary="mixture of experts: each token uses a few of many feedforwards",
    paper="2401.04088",
    exempt={"precision": PRECISION, "export": "the reference has no experts"},
    examples=(
        {**_SMALL, "ff_glu": True, "ff_swish": True, "ff_no_bias": True},
        {
            "ff_experts": 8,
            "ff_mult": 0.5,
            "ff_experts_topk": 3,
            "ff_router": "sigmoid",
            "ff_router_bias": True,
            "ff_router_groups": 4,
            "ff_router_groups_topk": 2,
            "ff_router_scale": 2.5,
            "ff_balance_bias": True,
            "ff_shared_mult": 1.5,
            "ff_shared_gate": True,
        },
        {**_SMALL, "ff_router": "keys", "ff_glu": True, "ff_glu_mult_bias": True},
        {"ff_experts": (None, 4), "ff_mult": (2, 0.5), "ff_experts_topk": 1, "ff_post_act_ln": True},
        {**_SMALL, "ff_experts_topk": 4, "ff_router_normalize": False},
        {**_SMALL, "ff_experts_topk": 1, "ff_expert_dropout": 0.4},
        {"ff_experts": 5, "ff_mult": 1.25, "ff_balance_loss_per_row": True, "ff_router_z_loss_weight": 0.1},
    ),
)
