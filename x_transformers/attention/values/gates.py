"""Gates on attention's output: per head (arXiv 2306.12929), or per feature from input or output (2608.11805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, ValueContext, ValueMod
from x_transformers.errors import ConfigError
from x_transformers.modules.lora import LoRALinear
from x_transformers.ops import merge_heads, split_heads
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class HeadGateOptions:
    gate_value_heads: bool = opt(False, "multiply the output of each head by a sigmoid gate, computed from the input")


class HeadGate(ValueMod):
    """Gate per head: `out_h <- out_h * sigmoid(w_h x + beta_h)`.

    Weights start at 0 and biases at 10, so that gates are open at first.

    Args:
        shape: widths of the attention.
    """

    reference: ClassVar = {"to_v_head_gate.weight": "gate.weight", "to_v_head_gate.bias": "gate.bias"}
    per_head: ClassVar = {"gate.weight": (0,), "gate.bias": (0,)}

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.dim, shape.heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 10.0)

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        return out * split_heads(self.gate(seen.x), out.shape[-3]).sigmoid()


@dataclass(frozen=True, kw_only=True)
class ValueGateOptions:
    gate_values: bool = opt(False, "multiply the output by a gate computed from the input")
    gate_values_rank: int | None = opt(None, "rank of that gate; default: full")
    gate_values_headwise: bool = opt(False, "one gate for each head instead of one for each feature")
    output_gate: bool = opt(False, "multiply the output by a gate computed from the output")
    output_gate_rank: int | None = opt(None, "rank of that gate; default: full")
    output_gate_headwise: bool = opt(False, "one gate for each head instead of one for each feature")
    low_rank_silu_gates: bool = opt(True, "SiLU between the two maps of gates with a rank")
    swiglu_values: bool = opt(False, "SiLU instead of the sigmoid as activation of the gates")

    def __post_init__(self) -> None:
        for name in ("gate_values", "output_gate"):
            rank, headwise = getattr(self, f"{name}_rank"), getattr(self, f"{name}_headwise")
            require(
                rank is None or not headwise,
                f"`{name}_headwise` has one row per head, and no rank; drop `{name}_rank`.",
            )
            require(rank is None or rank >= 1, f"`{name}_rank` is {rank}; it must be at least 1.")


class ValueGates(ValueMod):
    """Gates from input and output: `out <- out * act(A x + B out)`, act a sigmoid or SiLU; A and B start at 0.

    Args:
        shape: widths of the attention; gates have `h * e` features, or h if headwise.
        options: which of the two gates there are, their ranks, and the activation.

    Raises:
        ConfigError: if a rank is not below the wider of the widths that it connects.
    """

    acts_last = True
    reference: ClassVar = {
        "to_v_gate.weight": "input.weight",
        "to_v_gate.down.weight": "input.down.weight",
        "to_v_gate.up.weight": "input.up.weight",
        "to_output_gate.weight": "output.weight",
        "to_output_gate.down.weight": "output.down.weight",
        "to_output_gate.up.weight": "output.up.weight",
    }
    per_head: ClassVar = {
        "input.weight": (0,),
        "input.up.weight": (0,),
        "output.weight": (0, 1),
        "output.down.weight": (1,),
        "output.up.weight": (0,),
    }

    def __init__(self, shape: AttentionShape, options: ValueGateOptions) -> None:
        super().__init__()
        self.heads, self.swiglu = shape.heads, options.swiglu_values
        width = shape.heads * shape.value_dim_head

        def gate(name: str, dim_in: int) -> LoRALinear:
            headwise, rank = getattr(options, f"{name}_headwise"), getattr(options, f"{name}_rank")
            activation = nn.SiLU() if options.low_rank_silu_gates else None
            try:
                return LoRALinear(dim_in, shape.heads if headwise else width, rank, activation)
            except ConfigError as error:
                raise ConfigError(f"`{name}_rank`: {error}") from None

        self.input = gate("gate_values", shape.dim) if options.gate_values else None
        self.output = gate("output_gate", width) if options.output_gate else None

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        logits = None
        if self.input is not None:
            logits = split_heads(self.input(seen.x), self.heads)
        if self.output is not None:
            # some parts compute `out` in float32, and the gate's weights have the dtype of the input
            own = split_heads(self.output(merge_heads(out).to(seen.x.dtype)), self.heads)
            logits = own if logits is None else logits + own
        assert logits is not None
        return out * (torch.nn.functional.silu(logits) if self.swiglu else logits.sigmoid())


def build_head_gate(options: HeadGateOptions, shape: AttentionShape, **_: Any) -> HeadGate:
    """Build the gate of one attention."""
    return HeadGate(shape)


def build_gates(options: ValueGateOptions, shape: AttentionShape, **_: Any) -> ValueGates:
    """Build the gates of one attention."""
    return ValueGates(shape, options)


def _idle(options: ValueGateOptions) -> list[str]:
    """Return keywords without effect: those of a gate that is off, and that of ranks if there are none."""
    off = [name for name in ("gate_values", "output_gate") if not getattr(options, name)]
    idle = [f"{name}_{what}" for name in off for what in ("rank", "headwise")]
    return idle if options.gate_values_rank or options.output_gate_rank else [*idle, "low_rank_silu_gates"]


HEAD_GATE = Feature(
    name="gate_value_heads",
    group="attn",
    slot="values",
    options=HeadGateOptions,
    enabled=lambda options: options.gate_value_heads,
    build=build_head_gate,
    summary="a gate for each head, computed from the input",
    paper="2306.12929",
    examples=({"attn_gate_value_heads": True},),
)

GATES = Feature(
    name="value_gates",
    group="attn",
    slot="values",
    options=ValueGateOptions,
    enabled=lambda options: options.gate_values or options.output_gate,
    build=build_gates,
    idle=_idle,
    summary="gates on the output, computed from the input or output",
    paper="2608.11805",
    examples=(
        {"attn_gate_values": True, "attn_swiglu_values": True},
        {"attn_gate_values": True, "attn_gate_values_rank": 4, "attn_output_gate": True, "attn_output_gate_rank": 3},
        {"attn_gate_values": True, "attn_gate_values_headwise": True, "attn_output_gate": True},
    ),
)
