"""Soft clamping of logits: `c * tanh(logits / c)`, as in Gemma 2 (arXiv 2408.00118)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, Needs, ScoreFunction, ScoreMod, Stage
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import Span
from x_transformers.modules.fast_tanh import HALF, fast_tanh, has_fast_tanh
from x_transformers.ops import softclamp
from x_transformers.options.schema import Feature, opt, positive


@dataclass(frozen=True, kw_only=True)
class SoftclampOptions:
    softclamp_logits: bool = opt(False, "bound the logits by c * tanh(logits / c), after biases and before masks")
    logit_softclamp_value: float = opt(50.0, "the bound c")

    def __post_init__(self) -> None:
        positive(logit_softclamp_value=self.logit_softclamp_value)


class SoftclampLogits(ScoreMod):
    """Soft clamp of scores: `score <- c * tanh(score / c)`.

    Args:
        value: the bound c.

    Raises:
        ConfigError: if c is not positive.
    """

    needs = Needs.POINTWISE
    stage = Stage.CLAMP

    def __init__(self, value: float) -> None:
        super().__init__()
        if value <= 0:
            raise ConfigError(f"`logit_softclamp_value` is {value}; it must be positive.")
        self.value, self.fast = value, has_fast_tanh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # the process that reads a pickled module may have another GPU, and a compiler that does not know the function
        self.fast = has_fast_tanh()

    def bind(self, query: Span, keys: Span) -> BoundScore:
        def make_at() -> ScoreFunction:
            # `tanh(x) = 2 sigmoid(2 x) - 1`: a kernel computes an exponential in half the time of a tanh, and a number
            # that is a part of the kernel is not read for each score
            value, inverse, double = self.value, 1 / self.value, 2 / self.value
            fast = self.fast and query.pos.is_cuda

            def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                if fast and score.dtype in HALF:
                    return fast_tanh(score * inverse) * value
                return torch.sigmoid(score * double) * (2 * value) - value

            return at

        def pointwise_(scores: Tensor, out: Tensor) -> Tensor:
            return torch.mul(scores.div_(self.value).tanh_(), self.value, out=out)

        def chain(gradient: Tensor, tanh: Tensor) -> Tensor:
            # d/ds c tanh(s / c) = 1 - tanh(s / c)^2: the factors c and 1 / c cancel, and the tanh is all that is needed
            return torch.ops.aten.tanh_backward.grad_input(gradient, tanh, grad_input=gradient)

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=make_at,
            pointwise=lambda scores: softclamp(scores, self.value),
            pointwise_=pointwise_,
            chain=chain,
        )


def build(options: SoftclampOptions, **_: Any) -> SoftclampLogits:
    """Build the modification for one attention."""
    return SoftclampLogits(options.logit_softclamp_value)


FEATURE = Feature(
    name="softclamp_logits",
    group="attn",
    slot="score",
    options=SoftclampOptions,
    enabled=lambda options: options.softclamp_logits,
    build=build,
    summary="logits bounded by a tanh",
    paper="2408.00118",
    examples=({"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},),
)
