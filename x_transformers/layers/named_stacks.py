"""The named stacks: `Encoder`, `Decoder`, `CrossAttender`, `PrefixDecoder`, `TransformerBlock`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import ConfigError, Faults, ShapeError
from x_transformers.forward_pass.arguments import check_counts
from x_transformers.forward_pass.call import Span
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.catalog import KEYWORDS
from x_transformers.layers.layers import AttentionLayers
from x_transformers.options.signatures import parameter, show_keywords


class Encoder(AttentionLayers):
    """A bidirectional stack; see `AttentionLayers` for its arguments."""

    def __init__(self, **keywords: Any) -> None:
        _refuse_causal(keywords, "an Encoder is bidirectional", "a Decoder")
        super().__init__(causal=False, **_with_dim(self, keywords))


class Decoder(AttentionLayers):
    """A causal stack; see `AttentionLayers` for its arguments."""

    def __init__(self, **keywords: Any) -> None:
        _refuse_causal(keywords, "a Decoder is causal", "an Encoder")
        super().__init__(causal=True, **_with_dim(self, keywords))


class CrossAttender(AttentionLayers):
    """A stack of cross-attentions and feedforwards; see `AttentionLayers` for its arguments.

    Raises:
        ConfigError: if `cross_attend` or `only_cross` is given and not True, or as `AttentionLayers` raises it.
    """

    def __init__(self, **keywords: Any) -> None:
        for name in ("cross_attend", "only_cross"):
            if keywords.pop(name, True) is not True:
                raise ConfigError(f"CrossAttender: `{name}` is always True here; use an Encoder or a Decoder.")
        super().__init__(cross_attend=True, only_cross=True, **_with_dim(self, keywords))


@dataclass(frozen=True, eq=False)
class PrefixPairs:
    """Function that says which keys queries see: those up to their own slot, and all of a prefix.

    It is an object, since older compilers know no class of a function that is defined inside of another.

    Attributes:
        length: number of slots of the prefix, one number or `(b,)`; None if there is none.
    """

    length: int | Tensor | None

    def __call__(self, query: Span, keys: Span) -> Tensor:
        seen = (keys.index <= query.index.unsqueeze(-1))[None, None]
        if self.length is None:
            return seen
        length = torch.as_tensor(self.length, device=keys.index.device).reshape(-1, 1, 1, 1)
        return seen | (keys.slot[:, None, None] < length)


class PrefixDecoder(AttentionLayers):
    """A causal stack in which every token also sees a prefix of the sequence (1910.10683).

    It is built without causality and masks every pass, so that it cannot use a cache. See `AttentionLayers` for its
    arguments.

    Raises:
        ConfigError: if `causal` or `mv_split_residual` is given, or as `AttentionLayers` raises it.
    """

    looks_back = True

    def __init__(self, **keywords: Any) -> None:
        _refuse_causal(keywords, "a PrefixDecoder is causal after its prefix", "a Decoder")
        if keywords.get("mv_split_residual") is True:
            raise ConfigError(
                "PrefixDecoder: `mv_split_residual` takes means over the sequence, which would show the future to "
                "tokens after the prefix; drop it, or build a Decoder."
            )
        super().__init__(causal=False, **_with_dim(self, keywords))

    @passes_on(AttentionLayers.forward)
    def forward(
        self, x: Tensor, *args: Any, prefix_attn_len: int | Tensor | None = None, **arguments: Any
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """Run the stack; see `AttentionLayers.forward` for the other arguments.

        Args:
            x: `(b, n, D)`.
            prefix_attn_len: number of slots, from the first one of each row on, that all tokens see: one number or
                `(b,)`. Memory tokens and prepended embeddings count, padding on the left does not.

        Raises:
            ShapeError: if `prefix_attn_len` has another shape.
        """
        if isinstance(prefix_attn_len, Tensor) and prefix_attn_len.shape not in ((), (x.shape[0],)):
            raise ShapeError(
                f"`prefix_attn_len` has shape {tuple(prefix_attn_len.shape)}; it must be a number or ({x.shape[0]},)."
            )
        if prefix_attn_len is not None:
            check_counts(prefix_attn_len, "prefix_attn_len", None)

        pairs = PrefixPairs(prefix_attn_len)
        return super().forward(x, *args, pairs=pairs, **arguments)


class TransformerBlock(AttentionLayers):
    """One block, without a final norm, for use inside other models; see `AttentionLayers` for its arguments."""

    def __init__(self, dim: int, *, depth: int = 1, pre_norm_has_final_norm: bool = False, **keywords: Any) -> None:
        super().__init__(dim=dim, depth=depth, pre_norm_has_final_norm=pre_norm_has_final_norm, **keywords)


def _refuse_causal(keywords: dict[str, Any], what: str, other: str) -> None:
    if "causal" in keywords:
        raise ConfigError(f"{what}: drop `causal`, or build {other}.")


def _with_dim(stack: AttentionLayers, keywords: dict[str, Any]) -> dict[str, Any]:
    if "dim" not in keywords:
        faults, known = Faults(), inspect.signature(AttentionLayers).parameters
        for name in keywords:
            if name not in known:
                faults.add_unknown(name, known)
        faults.add("`dim` is missing, the width of the residual stream.")
        faults.raise_if_any(type(stack).__name__)
    return keywords


_DEFAULTS: dict[type[AttentionLayers], dict[str, Any]] = {
    Encoder: {},
    Decoder: {},
    PrefixDecoder: {},
    CrossAttender: {"cross_attend": True, "only_cross": True},
    TransformerBlock: {"depth": 1, "pre_norm_has_final_norm": False},
}
"""The named stacks, and defaults that differ from those of `AttentionLayers`."""

for _class, _defaults in _DEFAULTS.items():
    _leading = [parameter("dim", positional=_class is TransformerBlock)]
    if _class in (CrossAttender, TransformerBlock):
        _leading.append(parameter("causal", False))
    show_keywords(_class, KEYWORDS, _leading, _defaults)
