"""What a caller gives to every layer beside the stream, and what becomes of it before the first one: the condition of
adaptive norms, and an injection of the input into each sublayer (1909.01377, 2410.03020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError, ShapeError
from x_transformers.options.schema import Feature, Options, opt


@dataclass(frozen=True, kw_only=True)
class InjectionOptions:
    reinject_input: bool = opt(False, "a linear map of the stack's input is added to each sublayer's input")
    learned_reinject_input_gate: bool = opt(
        False, "what is added (also `in_attn_cond` of a pass) has a gate for each token"
    )


class ConditionMLP(nn.Module):
    """`silu(W condition)`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out, bias=False)

    def forward(self, condition: Tensor) -> Tensor:
        return F.silu(self.proj(condition))


class Injection(nn.Module):
    """`proj(x)`, or what the caller gives in its place, times `sigmoid(gate(x))`.

    Args:
        dim: width.
        project: inject the stack's input.
        gate: a learned gate for each token.
    """

    def __init__(self, dim: int, project: bool, gate: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False) if project else None
        self.gate = nn.Linear(dim, 1, bias=False) if gate else None

    def forward(self, x: Tensor, given: Tensor | None) -> Tensor | None:
        """`(b, n, D)` to be added to each sublayer's input; x is the stack's input."""
        if self.proj is not None:
            if given is not None:
                raise InputError("`reinject_input` injects the input; drop `in_attn_cond`.")
            given = self.proj(x)
        if given is None or self.gate is None:
            return given
        return given * self.gate(x).sigmoid()


def build_injection(options: InjectionOptions, dim: int) -> Injection:
    """The stack's injection, also where only a caller injects."""
    return Injection(dim, options.reinject_input, options.learned_reinject_input_gate)


def build_condition(options: Options, dim: int) -> ConditionMLP | None:
    """What the condition passes, if something reads it."""
    condition = options["condition"]
    if not condition.adaptive_condition_mlp:
        return None
    return ConditionMLP(condition.given_width(dim), condition.width(dim))


def newest(t: Tensor, batch: int, n: int, width: int, name: str) -> Tensor:
    """The part `(b, 1|n, width)` of a caller's tensor that speaks of the n tokens of this pass.

    Args:
        t: `(b, width)` for all tokens, or `(b, 1, width)`, or `(b, new or all tokens, width)`.

    Raises:
        ShapeError: if it has another shape.
    """
    shape = tuple(t.shape)
    t = t.unsqueeze(1) if t.ndim == 2 else t
    if t.ndim != 3 or t.shape[0] not in (1, batch) or t.shape[-1] != width or (t.shape[1] != 1 and t.shape[1] < n):
        raise ShapeError(
            f"`{name}` has shape {shape}; it must be ({batch}, {width}), or ({batch}, n, {width}) over at "
            f"least the {n} tokens of this pass."
        )
    return t[:, max(t.shape[1] - n, 0) :]


FEATURE = Feature(
    name="reinject_input",
    group="stack",
    slot="injection",
    options=InjectionOptions,
    enabled=lambda options: options.reinject_input or options.learned_reinject_input_gate,
    summary="the input is added to each sublayer's input",
    paper="2410.03020",
    examples=({"reinject_input": True}, {"reinject_input": True, "learned_reinject_input_gate": True}),
)
