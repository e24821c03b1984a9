"""PRepBN: LayerNorm that turns into batch norm while it trains, and is an affine map afterwards (2405.11582).

No pass changes a buffer: the statistics of a pass leave it as values, and `advance_norms` of a model takes them over
after a step of the optimizer. So a block that runs again for its gradients finds the norm as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.forward_pass.call import Carry, LayerCall, NormStatistics
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.inference import PreparesForInference
from x_transformers.modules.norms import Norm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Options, Rule, at_least, opt, require

MOMENTUM = 0.1
"""Share of a step in the running statistics."""


@dataclass(frozen=True, kw_only=True)
class PrepBNOptions:
    use_prepbn: bool = opt(
        False, "LayerNorm that turns into batch norm in training, and is an affine map in evaluation (`advance_norms`)"
    )
    prepbn_steps: int = opt(10000, "number of steps in which the share of LayerNorm falls from 1 to 0")

    def __post_init__(self) -> None:
        require(self.prepbn_steps >= 1, f"`prepbn_steps` is {self.prepbn_steps}; it must be at least 1.")


class PrepBN(KeepsFloat32, PreparesForInference, ReadsReference, Norm):
    """Progressive batch norm.

        batch(x) = (x - mean) / sqrt(var + eps) * (gamma + offset) + beta + eta * x
        training: lambda * LayerNorm(x) + (1 - lambda) * batch(x), with the mean and variance of the live tokens
        evaluation: batch(x), with the running mean and variance

    lambda falls from 1 to 0 in `steps` steps; `advance` counts them.

    Args:
        dim: width D.
        steps: number of steps until LayerNorm has no share.
        unit_offset: store gains minus 1.
        eps: added to the variance.

    Attributes:
        number: place among such norms of a stack.
    """

    running_mean: Tensor
    running_var: Tensor
    steps_done: Tensor

    def __init__(self, dim: int, steps: int = 10000, unit_offset: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        at_least(1, dim=dim, steps=steps)
        self.dim, self.steps, self.unit_offset, self.eps, self.number = dim, steps, unit_offset, eps, 0
        self.layer_gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))
        self.layer_beta = nn.Parameter(torch.zeros(dim))
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))
        self.beta = nn.Parameter(torch.zeros(dim))
        self.eta = nn.Parameter(torch.ones(1))
        self.register_derived(persistent=True)

    def derived_buffers(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.dim, dtype=torch.float32)
        return {"running_mean": zeros, "running_var": zeros + 1, "steps_done": torch.zeros((), dtype=torch.long)}

    def forward(
        self, x: Tensor, condition: Tensor | None = None, *, statistics: NormStatistics | None = None
    ) -> Tensor:
        """Normalize; in training by the batch.

        Args:
            x: `(..., D)` input.
            condition: ignored.
            statistics: of the batch; by default those of all tokens of `x`. Evaluation reads none.

        Returns:
            `(..., D)`.
        """
        if not self.training:
            slope, shift = self._affine(self.running_mean, self.running_var) if self.ready is None else self.ready
            if torch.is_grad_enabled():
                # sums of no numbers, so that LayerNorm has a gradient, which is zero
                shift = shift + self.layer_gamma[:0].sum() + self.layer_beta[:0].sum()
            return torch.addcmul(shift, at_least_float32(x), slope).to(self.gamma.dtype)
        seen = self.statistics_of(x, None) if statistics is None else statistics
        slope, shift = self._affine(seen.mean, seen.var)
        by_batch = torch.addcmul(shift, at_least_float32(x), slope)
        share = (1 - self.steps_done / self.steps).clamp(min=0).to(by_batch.dtype)
        return torch.lerp(by_batch, self.by_layer(x), share).to(self.gamma.dtype)

    def by_layer(self, x: Tensor) -> Tensor:
        """Return the LayerNorm of `x (..., D)`, at least in float32."""
        gain = at_least_float32(self.layer_gamma) + self.unit_offset
        return F.layer_norm(at_least_float32(x), (self.dim,), gain, at_least_float32(self.layer_beta), self.eps)

    def statistics_of(self, x: Tensor, live: Tensor | None) -> NormStatistics:
        """Return the mean and variance of the live tokens of a batch.

        Args:
            x: `(b, n, D)`; `(..., D)` if all tokens are live.
            live: `(b, n)` bool, or None.
        """
        wide = at_least_float32(x)
        axes = tuple(range(x.ndim - 1))
        if live is None:
            count = wide.new_full((), x[..., 0].numel())
            mean = wide.mean(dim=axes)
            var = (wide - mean).square().mean(dim=axes)
        else:
            hidden, count = ~live.unsqueeze(-1), live.sum().to(wide.dtype)
            mean = wide.masked_fill(hidden, 0.0).sum(dim=axes) / count.clamp(min=1)
            var = (wide - mean).masked_fill(hidden, 0.0).square().sum(dim=axes) / count.clamp(min=1)
        return NormStatistics(self.number, mean, var, count)

    @torch.no_grad()
    def advance(self, seen: NormStatistics) -> None:
        """Count a step, and move the running statistics towards those of its passes, in place.

        Args:
            seen: statistics of this norm; those of several processes are joined.
        """
        count = _over_processes(seen.tokens.clone())
        mean = _over_processes(seen.tokens * seen.mean) / count.clamp(min=1)
        squares = _over_processes(seen.tokens * (seen.var + (seen.mean - mean).square()))
        for running, new in ((self.running_mean, mean), (self.running_var, squares / (count - 1).clamp(min=1))):
            # without a token there is nothing to learn
            running.lerp_(new.to(running.dtype), MOMENTUM * (count > 0).to(running.dtype))
        self.steps_done += 1

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope and shift `(D,)` of the batch norm with these statistics."""
        gain = (at_least_float32(self.gamma) + self.unit_offset) * (var + self.eps).rsqrt()
        return gain + self.eta, self.beta - mean * gain

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Return the affine map of evaluation."""
        slope, shift = self._affine(self.running_mean, self.running_var)
        return slope.detach(), shift.detach()

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no `use_prepbn`; a model with it cannot be exported.")


PENDING: WeakKeyDictionary[PrepBN, NormStatistics] = WeakKeyDictionary()
"""Statistics that objectives left for the next step. They are no part of a module, as no value of a pass is."""


def norm_by_batch(
    norm: PrepBN, x: Tensor, memory: Tensor | None, layer: LayerCall
) -> tuple[Tensor, Tensor | None, LayerCall]:
    """Normalize the input of a sublayer in training, and its recurrent memory with the same statistics.

    Args:
        norm: of the sublayer.
        x: `(b, n, D)`.
        memory: `(b, m, D)`, or None.
        layer: the call of the sublayer.

    Returns:
        Both, and a call whose carry has the statistics.
    """
    seen = norm.statistics_of(x, layer.call.token_mask)
    memory = None if memory is None else norm(memory, statistics=seen)
    return norm(x, statistics=seen), memory, replace(layer, carry=with_statistics(layer.carry, seen))


def with_statistics(carry: Carry, seen: NormStatistics) -> Carry:
    """Return the carry with the statistics of one more norm, which have no gradient."""
    seen = NormStatistics(seen.number, seen.mean.detach(), seen.var.detach(), seen.tokens)
    return replace(carry, norm_statistics=(*carry.norm_statistics, seen))


@torch.no_grad()
def joined(seen: Sequence[NormStatistics]) -> NormStatistics:
    """Return the statistics of all tokens of several passes through one norm."""
    counts = torch.stack([each.tokens for each in seen]).unsqueeze(-1)
    means, variances = torch.stack([each.mean for each in seen]), torch.stack([each.var for each in seen])
    count = counts.sum()
    most = count.clamp(min=1)
    mean = (counts * means).sum(dim=0) / most
    var = (counts * (variances + (means - mean).square())).sum(dim=0) / most
    return NormStatistics(seen[0].number, mean, var, count)


def number_norms(stack: nn.Module) -> bool:
    """Number the norms of a stack that need statistics, and return True if there are some."""
    norms = [module for module in stack.modules() if isinstance(module, PrepBN)]
    for number, norm in enumerate(norms):
        norm.number = number
    return bool(norms)


def _over_processes(t: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
    return t


def build(dim: int, unit_offset: bool, options: Options, eps: float = 1e-5, **_: Any) -> PrepBN:
    """Build the norm of a stack."""
    return PrepBN(dim, options["prepbn"].prepbn_steps, unit_offset, eps)


FEATURE = Feature(
    name="prepbn",
    group="stack",
    slot="norm",
    choice="norm",
    options=PrepBNOptions,
    enabled=lambda options: options.use_prepbn,
    build=build,
    summary="LayerNorm that turns into batch norm in training",
    paper="2405.11582",
    refuses=(
        Rule(
            when=lambda o: o["norm"].norm_bias,
            why="`use_prepbn` has biases by itself; drop `norm_bias`.",
        ),
        Rule(
            when=lambda o: (
                not o["norm_placement"].before
                or o["norm_placement"].after
                or o["norm_placement"].output
                or o.on("resi_dual")
                or (o.on("residual_streams") and o["residual_streams"].gated_multi_residual)
            ),
            why="`use_prepbn` has statistics of what sublayers and the head read; set `pre_norm = True`, and drop "
            "`pre_and_post_norm`, `sandwich_norm`, `branch_norm`, `resi_dual` and `gated_multi_residual`.",
        ),
        Rule(
            when=lambda o: o.on("qkv_views"),
            why="`use_prepbn` has one mean and variance for a sublayer, and `qkv_receive_diff_residuals` gives it "
            "three inputs; drop one of them.",
        ),
        Rule(
            when=lambda o: o["parallel_block"].parallel_block_one_norm,
            why="`use_prepbn` has statistics for each sublayer, and `parallel_block_one_norm` leaves one norm for "
            "several; drop one of them.",
        ),
    ),
    exempt={
        "export": "the reference has no such norm",
        "gradients": r"\.layer_(gamma|beta)$: evaluation reads running statistics, without LayerNorm",
        "exits": "exits read the stream through the final norm after several blocks, whose statistics differ",
        "training": "training normalizes by the statistics of the batch",
    },
    examples=({"use_prepbn": True, "prepbn_steps": 10},),
)
