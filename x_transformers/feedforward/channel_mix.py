"""Channel mixing of RWKV-4 (2305.13048): a gated feedforward that reads a mix of each token and the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.modules.tied_linear import matrices_of
from x_transformers.ops import at_least_float32
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Feature, Options, Rule, Surroundings, at_least, opt, positive, require


class ChannelMix(Configured, ReadsReference, BranchFunction):
    """Channel mixing: `sigmoid(to_r r) * to_out(relu(to_hidden k)^2)`.

    `k` and `r` are mixes `mix * x_t + (1 - mix) * x_{t-1}` of a token and the one before it, each with its own mix. The
    token before the first one is zero, and tokens that others may not see are skipped. No map has a bias.

    First values of mixes depend on the place in the stack: later layers read less of the token before.

    Args:
        dim: width D of the model.
        mult: expansion; the inner width is `int(dim * mult)`.
        dropout: dropout after the squared ReLU.
        sublayer_dropout: dropout on the output.
        zero_init_output: initialize the output map to zero.
        output_proj_depth: initialize the output map with std `(2 * fan_in * depth) ** -0.5`.
    """

    state_names = ("shift",)
    features = ("feedforward", "rwkv_channel_mix")

    def __init__(
        self,
        dim: int,
        mult: float = 4,
        dropout: float = 0.0,
        sublayer_dropout: float = 0.0,
        zero_init_output: bool = False,
        output_proj_depth: int | None = None,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, output_proj_depth=output_proj_depth)
        positive(mult=mult)
        inner = int(dim * mult)
        require(inner >= 1, f"`dim` is {dim} and `mult` {mult}; the inner width is {inner}, choose others.")
        self.dropout, self.sublayer_dropout = dropout, sublayer_dropout
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.to_hidden = nn.Linear(dim, inner, bias=False)
        self.to_r = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        if zero_init_output:
            nn.init.zeros_(self.to_out.weight)
        elif output_proj_depth is not None:
            nn.init.normal_(self.to_out.weight, std=(2 * inner * output_proj_depth) ** -0.5)
        self.begin_at(0, 1)

    @torch.no_grad()
    def begin_at(self, number: int, count: int) -> None:
        feature = torch.arange(len(self.mix_k)) / len(self.mix_k)
        for mix in (self.mix_k, self.mix_r):
            mix.copy_(feature ** (1 - number / count))

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        call = layer.call
        states = layer.states if call.causal else None
        out, last = self.mix(x, call.token_mask, None if states is None else states.get("shift"))
        if states is not None:
            states.put("shift", last)
        return BranchOutput(out if layer.deep_embed is None else out * layer.deep_embed, None, layer.carry)

    @takes_no_more
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, layer: LayerCall | None = None, **unknown: Any
    ) -> Tensor | BranchOutput:
        """Apply the network to rows of tokens.

        Args:
            x: `(b, n, D)`.
            mask: `(b, n)` bool, True for tokens that others may see.
            layer: the call of a sublayer.

        Returns:
            `(b, n, D)`; with `layer`, a `BranchOutput`.
        """
        if unknown:
            check_names(self, ChannelMix.forward, unknown)
        return self.run(x, layer) if layer is not None else self.mix(x, mask, None)[0]

    def mix(self, x: Tensor, mask: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the network to the next tokens of rows.

        Args:
            x: `(b, n, D)`.
            mask: `(b, n)` bool, True for tokens that others may see; None: all.
            before: `(b, 1, D)` the last token before them that others may see; None: there is none.

        Returns:
            `(b, n, D)`, and the last such token now, at least in float32.
        """
        shifted, last = shift_by_one(x, mask, before)
        k, r = (shifted + mix.to(x.dtype) * (x - shifted) for mix in (self.mix_k, self.mix_r))
        hidden = F.relu(self.to_hidden(k)).square()
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        out = self.to_r(r).sigmoid() * self.to_out(hidden)
        if self.sublayer_dropout:
            out = F.dropout(out, self.sublayer_dropout, self.training)
        return out, last

    def muon_parameters(self) -> list[Tensor]:
        return matrices_of(self)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no channel mixing; a model with `ff_rwkv` cannot be exported.")


def shift_by_one(x: Tensor, mask: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the token before each one among those that others may see, zeros before the first one.

    Args:
        x: `(b, n, D)`.
        mask: `(b, n)` bool, True for tokens that others may see; None: all.
        before: `(b, 1, D)` the last of them before `x`; None: there is none.

    Returns:
        `(b, n, D)`, and the last of them after `x`, `(b, 1, D)`, at least in float32.
    """
    n = x.shape[1]
    whole = F.pad(x, (0, 0, 1, 0)) if before is None else torch.cat((before.to(x.dtype), x), dim=1)
    if mask is not None:
        # columns of `whole`: that of the last visible token up to each one, where the first is what came before
        column = torch.arange(1, n + 1, device=x.device) * mask
        newest = F.pad(column.cummax(dim=-1).values, (1, 0))
        whole = whole.gather(1, newest.unsqueeze(-1).expand_as(whole))
    # a state that shares the memory of all tokens would keep them, and have other strides after a longer pass
    return whole[:, :n], at_least_float32(whole[:, n:]).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, kw_only=True)
class ChannelMixOptions:
    rwkv: bool = opt(False, "channel mixing of RWKV, a gated feedforward that also reads the token before each one")


OTHER_NETWORKS = {
    "glu": "`glu`",
    "activation": "the other activation",
    "rational": "`rational`",
    "param_attention": "`param_attention`",
    "ff_softclamp": "the soft bounds",
    "post_act_ln": "`post_act_ln`",
    "experts": "`experts`",
    "soft_experts": "`soft_experts`",
    "heavy_feedforward": "the heavy feedforward",
}
"""Features of the feedforward that it does not have, and words for them."""


def _given(options: Options | Surroundings) -> list[str]:
    """Return what is given of another network."""
    words = [words for name, words in OTHER_NETWORKS.items() if options.on(name)]
    return [*words, "`no_bias`"] if options["feedforward"].no_bias else words


FEATURE = Feature(
    name="rwkv_channel_mix",
    group="ff",
    slot="feedforward",
    options=ChannelMixOptions,
    enabled=lambda options: options.rwkv,
    build=ChannelMix,
    summary="channel mixing of RWKV",
    paper="2305.13048",
    refuses=(
        Rule(
            when=lambda options: bool(_given(options)),
            why=lambda options: (
                "`rwkv` is a network of its own, with a squared ReLU, a gate and no biases; drop "
                f"{' and '.join(_given(options))}, or `rwkv`."
            ),
        ),
    ),
    unpackable="`ff_rwkv` would move features from one document into the next",
    exempt={"export": "the reference has no channel mixing"},
    examples=({"ff_rwkv": True}, {"ff_rwkv": True, "ff_mult": 2, "ff_dropout": 0.1, "mixer": "rwkv4"}),
)
