"""Options of a whole pass: repetitions of the stack, and defaults of arguments."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class Recycling(Keywords):
    recycling: bool = opt(False, "run the stack several times, adding a map of its output to its input")
    train_max_recycle_steps: int = opt(
        4, "in training a pass draws the number of runs from 1 to this; evaluation uses it as default"
    )

    def __post_init__(self) -> None:
        at_least(1, train_max_recycle_steps=self.train_max_recycle_steps)


RECYCLING = model_feature(
    "recycling",
    Recycling,
    "the stack reads a map of its own output, as AlphaFold 2 does",
    enabled=lambda options: options.recycling,
)


@dataclass(frozen=True, kw_only=True)
class Looped(Keywords):
    looped: bool = opt(False, "not available in this version")
    max_looped_steps: int = opt(4, "not available in this version")

    def __post_init__(self) -> None:
        name = "looped" if self.looped else "max_looped_steps"
        require(
            not self.looped and self.max_looped_steps == 4,
            f"`{name}` is not available in this version; drop it. `recycling` also runs a stack several times.",
        )


LOOPED = model_feature("looped", Looped, "looped models, which are not available in this version")


@dataclass(frozen=True, kw_only=True)
class AttentionZLoss(Keywords):
    attn_z_loss_weight: float = opt(1e-4, "default of the argument of a pass")

    def __post_init__(self) -> None:
        weight = self.attn_z_loss_weight
        require(weight >= 0, f"`attn_z_loss_weight` is {weight}; it must not be negative.")


ATTENTION_Z_LOSS = model_feature(
    "attn_z_loss", AttentionZLoss, "a penalty on large logits of attention", paper="2202.08906"
)


@dataclass(frozen=True, kw_only=True)
class NewTokensOnly(Keywords):
    input_not_include_cache: bool = opt(False, "default of the argument of a pass")


NEW_TOKENS_ONLY = model_feature("new_tokens_only", NewTokensOnly, "cached passes are given the new tokens only")
