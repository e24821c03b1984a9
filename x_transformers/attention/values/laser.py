"""LASER: attention over exponentials of values, for larger gradients through the weights (arXiv 2411.03493)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import ValueContext, ValueMod
from x_transformers.ops import at_least_float32, log, softclamp
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class LaserOptions:
    laser: bool = opt(False, "attend over exp(v), and take the logarithm of the output")
    laser_softclamp_value: float = opt(15.0, "soft clamp c of the values before: c * tanh(v / c)")

    def __post_init__(self) -> None:
        value = self.laser_softclamp_value
        require(value > 0, f"`laser_softclamp_value` is {value}; it must be positive.")


class Laser(ValueMod):
    """Log-space attention: `out = log(weights exp(c tanh(v / c)))`, in float32 or wider.

    Queries that see no key have output 0. The zero value of `add_zero_kv` stays zero, not `exp(0)`.

    Args:
        clamp: the bound c.
    """

    def __init__(self, clamp: float) -> None:
        super().__init__()
        self.clamp = clamp

    def prepare_values(self, v: Tensor) -> Tensor:
        # float16 ends at exp(11), below the default bound of 15
        return softclamp(at_least_float32(v), self.clamp).exp()

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        # `log` clamps at 1e-20, so that an output of 0, where no key is visible, would become -46
        out = log(out)
        return out if seen.fully_masked is None else out.masked_fill(seen.fully_masked, 0.0)


def build(options: LaserOptions, **_: Any) -> Laser:
    """Build the modification for one attention."""
    return Laser(options.laser_softclamp_value)


FEATURE = Feature(
    name="laser",
    group="attn",
    slot="values",
    options=LaserOptions,
    enabled=lambda options: options.laser,
    build=build,
    summary="attention over exponentials of values",
    paper="2411.03493",
    refuses=tuple(
        Rule(
            when=lambda o, other=other: o.on(other),
            why=f"`laser` takes the logarithm of attention's output, and `{keyword}` makes it negative; drop one.",
        )
        for other, keyword in (
            ("cog_signed", "cog_signed"),
            ("pre_scale_post_talking_heads", "pre_scale_post_talking_heads"),
        )
    ),
    examples=({"attn_laser": True}, {"attn_laser": True, "attn_laser_softclamp_value": 2.0}),
)
