"""Inputs that every layer reads besides the residual stream: the condition of adaptive norms and scales, and the
injection of the stack's input into each sublayer (1909.01377, 2410.03020).

Both are computed once per pass, before the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError, ShapeError
from x_transformers.ops import finite_where_hidden
from x_transformers.options.schema import Feature, Options, opt


@dataclass(frozen=True, kw_only=True)
class InjectionOptions:
    reinject_input: bool = opt(False, "add a linear map of the stack's input to each sublayer's input")
    learned_reinject_input_gate: bool = opt(
        False, "gate what is added to each sublayer's input, token by token; applies to `in_attn_cond` too"
    )


class ConditionMLP(nn.Module):
    """Map of the condition for adaptive norms and scales: `silu(W condition)`.

    Args:
        width: width of the condition.
        out: width of the result.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out, bias=False)

    def forward(self, condition: Tensor) -> Tensor:
        return F.silu(self.proj(condition))


class Injection(nn.Module):
    """Injection into each sublayer: `P x`, or a tensor of the caller's, times `sigmoid(g x)`.

    Args:
        dim: model width D.
        project: inject a linear map `P` of the stack's input; False: inject what the caller passes.
        gate: multiply by a learned gate per token.
    """

    def __init__(self, dim: int, project: bool, gate: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False) if project else None
        self.gate = nn.Linear(dim, 1, bias=False) if gate else None

    def forward(self, x: Tensor, given: Tensor | None) -> Tensor | None:
        """Return the tensor to add to each sublayer's input; None if nothing is injected.

        Args:
            x: `(b, n, D)` input of the stack.
            given: `(b, 1|n, D)` the caller's `in_attn_cond`, or None.

        Returns:
            `(b, n, D)`, or `(b, 1|n, D)` if the caller's tensor has no gate; None.

        Raises:
            InputError: if the caller passes a tensor although the stack's input is injected.
        """
        if self.proj is not None:
            if given is not None:
                raise InputError(
                    "`in_attn_cond` cannot be combined with `reinject_input`, which injects the stack's input; "
                    "drop `in_attn_cond`."
                )
            given = self.proj(x)
        if given is None or self.gate is None:
            return given
        return given * self.gate(x).sigmoid()


def build_injection(options: InjectionOptions, dim: int) -> Injection:
    """Build the injection of a stack, also if only callers inject."""
    return Injection(dim, options.reinject_input, options.learned_reinject_input_gate)


def build_condition(options: Options, dim: int) -> ConditionMLP | None:
    """Build the map that the condition passes through; None if adaptive parts read the condition itself."""
    condition = options["condition"]
    if not condition.adaptive_condition_mlp:
        return None
    return ConditionMLP(condition.given_width(dim), condition.width(dim))


def select_new_tokens(t: Tensor, batch: int, n: int, width: int, name: str, valid: Tensor | None) -> Tensor:
    """Return the part of a caller's tensor that belongs to the n tokens of this pass, finite at hidden ones.

    In decoding with a cache, a caller may pass the tensor for the new tokens only, or for the whole sequence.

    Args:
        t: `(b, width)` or `(b, 1, width)`, the same for all tokens; or `(b, m, width)` with m >= n, of which the last n
            belong to this pass. The batch may be 1.
        batch: batch size b of the pass.
        n: number of tokens of the pass.
        width: expected width.
        name: name of the argument, for the error.
        valid: `(1|b, n)` bool, False at hidden tokens; None if there are none.

    Returns:
        `(b, 1|n, width)`.

    Raises:
        ShapeError: if `t` has another shape.
    """
    shape = tuple(t.shape)
    if not t.is_floating_point():
        raise InputError(f"`{name}` has dtype {t.dtype}; it must be floating.")
    t = t.unsqueeze(1) if t.ndim == 2 else t
    if t.ndim != 3 or t.shape[0] not in (1, batch) or t.shape[-1] != width or (t.shape[1] != 1 and t.shape[1] < n):
        raise ShapeError(
            f"`{name}` has shape {shape}; it must be ({batch}, {width}), or ({batch}, n, {width}) over at "
            f"least the {n} tokens of this pass."
        )
    t = t[:, max(t.shape[1] - n, 0) :]
    return t if valid is None or t.shape[1] != n else finite_where_hidden(t, valid)


FEATURE = Feature(
    name="reinject_input",
    group="stack",
    slot="injection",
    options=InjectionOptions,
    enabled=lambda options: options.reinject_input or options.learned_reinject_input_gate,
    summary="the stack's input is added to each sublayer's input",
    paper="2410.03020",
    examples=({"reinject_input": True}, {"reinject_input": True, "learned_reinject_input_gate": True}),
)
