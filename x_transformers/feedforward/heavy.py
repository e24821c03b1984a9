"""Conditional feedforward: a narrow network for all tokens, and a wide one for the best of a row (2303.09752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import ConfigError, Faults, StateDictError
from x_transformers.feedforward import feedforward
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.feedforward.whole_rows import ReadsWholeRows
from x_transformers.modules.branch_function import BranchCost
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Feature, Schema, at_least, opt, positive, require
from x_transformers.options.signatures import parameter, show_keywords
from x_transformers.routing.best_tokens import BestTokens


@dataclass(frozen=True, kw_only=True)
class HeavyOptions:
    heavy_tokens: int | None = opt(
        None, "number of tokens of a row that a second, wide feedforward changes too; encoders only. None: no such one"
    )
    heavy_share: float | None = opt(None, "the same as a share of the tokens of a row, instead of their number")
    heavy_mult: float = opt(4, "expansion of the wide feedforward; `mult` is that of the narrow one for all tokens")
    heavy_ratio: float = opt(9 / 8, "factor of their number in the soft top-k that scores them")
    heavy_temperature: float = opt(0.03, "temperature of the soft top-k; the lower, the fewer tokens teach the router")
    heavy_straight: bool = opt(
        True, "multiply the outputs of the wide feedforward by 1 with the gradient of the score; False: by the score"
    )

    def __post_init__(self) -> None:
        at_least(1, heavy_tokens=self.heavy_tokens)
        positive(heavy_mult=self.heavy_mult, heavy_temperature=self.heavy_temperature)
        share = self.heavy_share
        require(share is None or 0 < share <= 1, f"`heavy_share` is {share}; it must lie in (0, 1].")
        require(
            share is None or self.heavy_tokens is None,
            f"`heavy_tokens` = {self.heavy_tokens} and `heavy_share` = {share} both say how many tokens are chosen; "
            "keep one of them.",
        )
        require(
            self.heavy_ratio >= 1,
            f"`heavy_ratio` is {self.heavy_ratio}; it must be at least 1, or chosen tokens would get a score near 0.",
        )

    @property
    def number(self) -> int | float | None:
        """Number of chosen tokens, or their share; None if there is no wide network."""
        return self.heavy_share if self.heavy_tokens is None else self.heavy_tokens


FEATURE = Feature(
    name="heavy_feedforward",
    group="ff",
    slot="feedforward",
    choice="network of experts",
    options=HeavyOptions,
    enabled=lambda options: options.number is not None,
    summary="a second, wide feedforward for the best tokens of a row",
    paper="2303.09752",
    unpackable="`ff_heavy_tokens` and `ff_heavy_share` choose among all tokens of a row",
    exempt={
        "precision": "a rounded score may choose another token",
        "export": "the reference has no heavy feedforward",
    },
    examples=(
        {"ff_heavy_tokens": 3, "ff_heavy_mult": 2, "ff_mult": 0.5, "ff_heavy_temperature": 0.5},
        {"ff_heavy_share": 0.25, "ff_heavy_straight": False, "ff_heavy_ratio": 1.5},
    ),
)

SCHEMA = Schema((*feedforward.FEATURES, FEATURE))
OWN = frozenset(name for name, feature in SCHEMA.owner.items() if feature is FEATURE)
"""The keywords that only this network has."""


class HeavyFeedForward(Configured, ReadsReference, ReadsWholeRows):
    """Narrow feedforward for all tokens of a row, and a wide one for the best of them, both as `FeedForward`.

        s = x . u        T = topk(s)        y_t = light(x_t) + [t in T] l_t heavy(x_t)

    l is the soft top-k of s, see `soft_topk`, and thus the gradient of the router u. With `heavy_straight` its value is
    1. Only the rows of T are computed. The number of chosen tokens does not depend on other rows or on padding: a row
    with fewer tokens than `heavy_tokens` chooses all.

    Args:
        dim: width of the input.
        dim_out: width of the output; default `dim`.
        mult: expansion of the narrow network.
        options: further keywords; those of `FeedForward` are for both networks, apart from `sublayer_dropout`.

    Raises:
        ConfigError: if keywords are unknown or values are out of range; the message lists all of them.
    """

    reads = "chooses the best tokens of a whole row, which a causal stack does not know yet"
    otherwise = "`depth_routing = 'threshold'`"

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, **options: Any) -> None:
        super().__init__()
        faults = Faults()
        parsed = SCHEMA.parse({"dim_out": dim_out, "mult": mult, **options}, faults)
        faults.raise_if_any("HeavyFeedForward")
        own: HeavyOptions = parsed["heavy_feedforward"]
        if own.number is None:
            raise ConfigError(
                "HeavyFeedForward: `heavy_tokens` and `heavy_share` are None; give one of them, or use a FeedForward."
            )
        self.dim = dim
        self.switch = "ff_heavy_share" if own.heavy_tokens is None else "ff_heavy_tokens"
        self.features = tuple(feature.name for feature in parsed.enabled())
        self.sublayer_dropout = parsed["feedforward"].sublayer_dropout
        both = {name: value for name, value in options.items() if name not in OWN} | {"sublayer_dropout": 0.0}
        self.light = FeedForward(dim, dim_out=dim_out, mult=mult, **both)
        self.router = BestTokens(dim, own.number, own.heavy_ratio, own.heavy_temperature, own.heavy_straight)
        self.heavy = FeedForward(dim, dim_out=dim_out, mult=own.heavy_mult, **both)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the outputs of the narrow network, to which those of the wide one are added at the chosen tokens."""
        choice = self.router(x, mask)
        heavy = self.heavy(choice.take(x))
        out = choice.put(heavy * choice.scores.unsqueeze(-1), self.light(x))
        return F.dropout(out, self.sublayer_dropout, self.training) if self.sublayer_dropout else out

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices of both networks, which Muon may orthogonalize."""
        return [*self.light.muon_parameters(), *self.heavy.muon_parameters()]

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        tokens = max(surroundings.get("seq_len", 1), 1)
        chosen = self.router.count(tokens)
        light, heavy = (sum(p.numel() for p in network.parameters()) for network in (self.light, self.heavy))
        of_light, of_heavy = self.light.explain(situation).flops, self.heavy.explain(situation).flops
        words = f"{chosen} of {tokens} tokens in a network of {self.heavy.down.in_features}"
        flops = of_light + of_heavy * chosen // tokens + 2 * self.dim
        return BranchCost("", words, flops, light + heavy * chosen // tokens + self.dim)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError(
            f"the reference has no heavy feedforward; a model with `{self.switch}` cannot be exported."
        )


show_keywords(HeavyFeedForward, [(SCHEMA, "")], [parameter("dim", positional=True)])
"""Keywords of conditional feedforwards."""
