"""A bound on what leaves the last layer: `c * tanh(x / c)` (2408.00118)."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class OutputClampOptions:
    softclamp_output: bool = opt(False, "bound the stream behind the last layer, before the final norm")
    softclamp_output_value: float = opt(30.0, "the bound")

    def __post_init__(self) -> None:
        value = self.softclamp_output_value
        require(value > 0, f"`softclamp_output_value` is {value}; it must be positive.")


FEATURE = Feature(
    name="softclamp_output",
    group="stack",
    slot="output",
    options=OutputClampOptions,
    enabled=lambda options: options.softclamp_output,
    summary="a bound on the stream behind the last layer",
    paper="2408.00118",
    examples=({"softclamp_output": True, "softclamp_output_value": 1.5},),
)
