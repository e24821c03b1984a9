"""Feedforwards whose weights are stacked along a first axis, one for each expert of a mixture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.feedforward.activations import build_activation
from x_transformers.feedforward.glu import bounded, gated, with_bounds
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.modules.norms import LayerNorm
from x_transformers.options.schema import Options, at_least, require

ApplyMaps = Callable[[Tensor, nn.Parameter, nn.Parameter | None], Tensor]
"""Applies to each row the map of its expert: `(rows, weights (E, out, in), biases (E, out)) -> rows`."""

STACKS = ("up", "up_bias", "gate_scale", "down", "down_bias")
"""Names of the parameters with an axis of experts, which is the first one; some may be None."""


class ExpertNetworks(BranchFunction):
    """Abstract base class of mixtures of E feedforward networks, each as `FeedForward` has them.

    Experts share activations and the norm after these. `no_bias` here means no bias at all.

    Attributes:
        dim, inner: widths of the input and of the hidden layer of one expert.
        experts: their number E.
        up: `(E, inner, D)` matrices, in a gated network `(E, 2 inner, D)`, of the gated value first, then of the gate.
        down: `(E, dim_out, inner)` matrices.
    """

    def build_networks(self, parsed: Options, dim: int, experts: int) -> None:
        """Build the networks.

        Args:
            parsed: options of the features of a feedforward.
            dim: width of the input.
            experts: number of networks.

        Raises:
            ConfigError: if a width is out of range.
        """
        core, glu = parsed["feedforward"], parsed["glu"]
        self.dim, self.inner, self.experts = dim, inner_width(dim, core.mult), experts
        self.glu, self.dropout, self.sublayer_dropout = glu.glu, core.dropout, core.sublayer_dropout
        self.biased = not (core.no_bias or (glu.glu and glu.glu_no_bias))
        inner, width = self.inner, dim if core.dim_out is None else core.dim_out
        self.input_activation = parsed["rational"].build_input(dim)
        self.up, self.up_bias = _stack_of_maps(experts, dim, 2 * inner if glu.glu else inner, self.biased)
        self.activation, self.bound = with_bounds(build_activation(parsed, inner), parsed)
        self.gate_scale = nn.Parameter(torch.ones(experts, inner)) if glu.glu and glu.glu_mult_bias else None
        self.norm = LayerNorm(inner) if parsed["post_act_ln"].post_act_ln else None
        self.down, self.down_bias = _stack_of_maps(experts, inner, width, not core.no_bias)
        parsed["rational"].scale_maps(self.up, self.down)
        if core.zero_init_output:
            nn.init.zeros_(self.down)
            if self.down_bias is not None:
                nn.init.zeros_(self.down_bias)
        elif core.output_proj_depth is not None:
            nn.init.normal_(self.down, std=(2 * inner * core.output_proj_depth) ** -0.5)

    def apply_networks(self, rows: Tensor, apply_maps: ApplyMaps, gate_scale: Tensor | None) -> Tensor:
        """Apply to each row the network of its expert.

        Args:
            rows: `(..., dim)`.
            apply_maps: applies one of the stacks of maps.
            gate_scale: `gate_scale` of the experts of the rows, broadcastable to `(..., inner)`; or None.

        Returns:
            `(..., dim_out)`.
        """
        if self.input_activation is not None:
            rows = self.input_activation(rows)
        x = apply_maps(rows, self.up, self.up_bias)
        if self.glu:
            x = gated(x, self.activation, self.bound, None)
            if gate_scale is not None:
                x = x * gate_scale
        else:
            x = self.activation(x if self.bound is None else bounded(x, self.bound))
        if self.norm is not None:
            x = self.norm(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return apply_maps(x, self.down, self.down_bias)

    @property
    def stacks(self) -> list[Tensor]:
        """Parameters with a part for each expert."""
        stacks = [getattr(self, name) for name in STACKS]
        return [t for t in stacks if t is not None]

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize: each of the stacks."""
        return [self.up, self.down]


def inner_width(dim: int, mult: float) -> int:
    """Return the width of the hidden layer, `int(dim * mult)`.

    Raises:
        ConfigError: if it is out of range.
    """
    at_least(1, dim=dim)
    inner = int(dim * mult)
    require(1 <= inner < 2**31, f"`dim` is {dim} and `mult` {mult}; the inner width is {inner}, choose others.")
    return inner


def _stack_of_maps(count: int, dim: int, out: int, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weights `(count, out, dim)` and biases `(count, out)` of linear maps, with the values of `nn.Linear`."""
    # not through the functions of `nn.init`, which would take the number of maps for a part of the width
    bound = dim**-0.5
    weight = nn.Parameter(torch.empty(count, out, dim).uniform_(-bound, bound))
    return weight, nn.Parameter(torch.empty(count, out).uniform_(-bound, bound)) if bias else None
