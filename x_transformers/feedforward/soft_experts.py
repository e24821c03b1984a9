"""Soft mixture of experts: they read mixes of the tokens of a row, and tokens mixes of their outputs (2308.00951)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, Faults, StateDictError
from x_transformers.feedforward import feedforward
from x_transformers.feedforward.expert_networks import ExpertNetworks, inner_width
from x_transformers.feedforward.whole_rows import ReadsWholeRows
from x_transformers.modules.branch_function import BranchCost
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32, max_neg_value, unit_length
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Feature, Schema, at_least, opt, require
from x_transformers.options.signatures import parameter, show_keywords


@dataclass(frozen=True, kw_only=True)
class SoftExpertOptions:
    soft_experts: int | None = opt(
        None, "number of experts, each of which reads mixes of all tokens of a row; encoders only. None: no mixture"
    )
    soft_slots: int = opt(1, "number of mixes that each of them reads")
    soft_noise: float = opt(0.0, "factor of Gumbel noise on the logits of the mixes in training")

    def __post_init__(self) -> None:
        at_least(1, soft_experts=self.soft_experts, soft_slots=self.soft_slots)
        require(self.soft_noise >= 0, f"`soft_noise` is {self.soft_noise}; it must not be negative.")


FEATURE = Feature(
    name="soft_experts",
    group="ff",
    slot="feedforward",
    choice="network of experts",
    options=SoftExpertOptions,
    enabled=lambda options: options.soft_experts is not None,
    summary="soft mixture of experts: experts read mixes of all tokens",
    paper="2308.00951",
    unpackable="`ff_soft_experts` mixes all tokens of a row",
    exempt={"export": "the reference has no experts"},
    examples=(
        {"ff_soft_experts": 3, "ff_soft_slots": 2, "ff_mult": 1},
        {"ff_soft_experts": 4, "ff_mult": 1, "ff_glu": True, "ff_glu_mult_bias": True, "ff_no_bias": True},
        {"ff_soft_experts": (None, 3), "ff_mult": 2, "ff_soft_noise": 0.5},
    ),
)

SCHEMA = Schema((*feedforward.FEATURES, FEATURE))
OWN = frozenset(name for name, feature in SCHEMA.owner.items() if feature is FEATURE)
"""The keywords that only soft experts have."""


class SoftExperts(Configured, ReadsReference, ReadsWholeRows, ExpertNetworks):
    """Soft mixture of E experts, each a feedforward network f as `FeedForward` has them.

        x' = sqrt(D) x / |x| * g        Z = x' (sqrt(D) P / |P| * h)^T
        y_t = sum over slots s of softmax_s(Z)[t, s] f_e(s)(sum over tokens u of softmax_u(Z)[u, s] x'_u)

    Each expert reads a few slots, each slot a mix of all tokens of a row, and each token a mix of what the experts make
    of all slots. No token is dropped, loads need no balance, and the cost depends on the number of slots. Tokens of a
    row see each other, so that the stack must neither be causal nor look back. The softmaxes are computed in float32.

    Args:
        dim: width D of the input.
        dim_out: width of the output; default `dim`.
        mult: expansion of one expert; its inner width is `int(dim * mult)`.
        soft_experts: number E of experts.
        soft_slots: number S of slots of an expert.
        options: further keywords, those of `FeedForward` included. `no_bias` here means no bias at all.

    Attributes:
        slots: `(E, S, D)` vectors P of the slots.
        slot_gain, token_gain: `(D,)` gains h and g.

    Raises:
        ConfigError: if keywords are unknown or values are out of range; the message lists all of them.
    """

    switch = "ff_soft_experts"
    reads = "mixes all tokens of a row, so that a token would see later ones"
    otherwise = "`ff_experts`"

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, **options: Any) -> None:
        super().__init__()
        faults = Faults()
        parsed = SCHEMA.parse({"dim_out": dim_out, "mult": mult, **options}, faults)
        SCHEMA.check_choices(parsed, faults)
        SCHEMA.check_rules(parsed, parsed, faults)
        faults.raise_if_any("SoftExperts")
        own: SoftExpertOptions = parsed["soft_experts"]
        if own.soft_experts is None:
            raise ConfigError(
                "SoftExperts: `soft_experts` is None; it must be the number of experts, or use a FeedForward."
            )
        inner_width(dim, parsed["feedforward"].mult)
        self.features = tuple(feature.name for feature in parsed.enabled())
        self.noise = own.soft_noise
        self.token_gain, self.slot_gain = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.slots = nn.Parameter(torch.randn(own.soft_experts, own.soft_slots, dim))
        self.build_networks(parsed, dim, own.soft_experts)

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return for each token its mix of what the experts make of the slots; zero for hidden tokens."""
        tokens, dispatch, combine = self.mixing_weights(x, mask)
        slots = torch.bmm(dispatch.transpose(1, 2).to(x.dtype), tokens.to(x.dtype))
        b, each = x.shape[0], self.slots.shape[1]
        # expert by expert, the slots of all rows
        rows = slots.unflatten(1, (self.experts, each)).transpose(0, 1).flatten(1, 2)
        scale = None if self.gate_scale is None else self.gate_scale.unsqueeze(1)
        out = self.apply_networks(rows, _apply_maps, scale).unflatten(1, (b, each)).transpose(0, 1).flatten(1, 2)
        out = torch.bmm(combine.to(out.dtype), out)
        return F.dropout(out, self.sublayer_dropout, self.training) if self.sublayer_dropout else out

    def mixing_weights(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalized tokens `(b, n, dim)`, and the weights of tokens in slots and of slots in tokens.

        Args:
            x: `(b, n, dim)`.
            mask: `(b, n)` bool, True for tokens that others may see; None: all.

        Returns:
            also two tensors `(b, n, E S)`, which are zero at hidden tokens; at least in float32, as the tokens are.
        """
        with torch.autocast(x.device.type, enabled=False):
            length = self.dim**0.5
            tokens = unit_length(at_least_float32(x), length) * at_least_float32(self.token_gain)
            slots = unit_length(at_least_float32(self.slots), length) * at_least_float32(self.slot_gain)
            logits = tokens @ slots.flatten(0, 1).t()
            if self.noise and self.training:
                logits = logits - self.noise * torch.empty_like(logits).exponential_().log()
            if mask is None:
                return tokens, logits.softmax(dim=1), logits.softmax(dim=2)
            hidden = ~mask.unsqueeze(-1)
            # in a row without visible tokens all weights of the softmax are equal, and then zero
            dispatch = logits.masked_fill(hidden, max_neg_value(logits)).softmax(dim=1).masked_fill(hidden, 0.0)
            return tokens, dispatch, logits.softmax(dim=2).masked_fill(hidden, 0.0)

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        tokens, slots = surroundings.get("seq_len", 1), self.slots.shape[1]
        count = self.experts * slots
        # products of tokens with slots, for logits and both mixes; and the experts' matrices, for each slot
        matrices = (self.up.numel() + self.down.numel()) // self.experts
        flops = 6 * count * self.dim + 2 * matrices * count // max(tokens, 1)
        words = f"{self.experts} experts of {self.inner}, each for {slots} mixes of all tokens"
        return BranchCost("bmm", words, flops)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no experts; a model with `ff_soft_experts` cannot be exported.")


def _apply_maps(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply the map of each expert to its rows `(E, R, in)`."""
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))


show_keywords(SoftExperts, [(SCHEMA, "")], [parameter("dim", positional=True)])
"""Keywords of feedforwards that are soft mixtures of experts."""
