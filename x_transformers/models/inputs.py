"""Arguments of one pass of a model, and which of the caller's tokens are new in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache import KVCache, tokens_to_run
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import kinds_of, read_masks_of
from x_transformers.forward_pass.call import Capture, check_attributes
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.memory_layout import MemoryLayout
from x_transformers.options.values import shown


@dataclass(eq=False, kw_only=True)
class ModelInputs:
    """Arguments of a model's `forward`, under their public names. An argument that a model does not have is None.

    Tensors over tokens cover only the tokens, never memory tokens or prepended embeddings.

    Attributes:
        stack: arguments that the model passes on to its stack.
        z_loss_weight: weight of the z-loss of attention, or None if it was not requested.
    """

    stack: dict[str, Any]
    mask: Tensor | None = None
    self_attn_kv_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    pos: Tensor | None = None
    seq_start_pos: Tensor | None = None
    sum_embeds: Tensor | float | None = None
    embed_ids: Mapping[str, Tensor] | None = None
    prepend_embeds: Tensor | None = None
    prepend_mask: Tensor | None = None
    mems: Sequence[Tensor | None] | None = None
    mem_masks: Sequence[Tensor | None] | None = None
    detach_mems: bool = True
    cache: LayerIntermediates | KVCache | None = None
    input_not_include_cache: bool = False
    cache_age: int | None = None
    return_embeddings: bool = False
    return_logits_and_embeddings: bool = False
    return_intermediates: bool = False
    return_logit_entropies: bool = False
    return_next_embed_pred: bool = False
    return_mems: bool = False
    return_attn: bool = False
    z_loss_weight: float | None = None
    return_aux_loss: bool = False
    return_exits: bool | Sequence[int] = False
    capture: Capture | None = None
    logits_to_keep: int | None = None

    def __post_init__(self) -> None:
        check_attributes(self, KINDS)
        if self.mask is not None or self.self_attn_kv_mask is not None or self.prepend_mask is not None:
            read_masks_of(self, ("mask", "self_attn_kv_mask", "prepend_mask"))
        if self.attn_mask is not None:
            read_masks_of(self, ("attn_mask",))

    @property
    def needs_record(self) -> bool:
        """True if anything but the output is requested.

        Raises:
            InputError: if it is specified what to record, but not requested.
        """
        needed = (
            self.return_intermediates
            or self.return_mems
            or self.return_attn
            or self.return_logit_entropies
            or self.z_loss_weight is not None
            or (self.return_aux_loss and self.capture is not None)
        )
        if self.capture is not None and not needed:
            raise InputError(
                "`capture` specifies what intermediates contain; request them with `return_intermediates`."
            )
        return needed


KINDS = kinds_of(ModelInputs)


def check_own(flags: tuple[bool, ...], transform: Any, *keywords: Any) -> None:
    """Raise an `InputError` for arguments of a model that no `ModelInputs` hold and that are of another kind.

    Args:
        flags: what is requested.
        transform: function of the token embeddings, or None.
        keywords: of a caller's modules, or None.
    """
    for flag in flags:
        if flag is not False and flag is not True:
            raise InputError(f"`return_...` or `excise_prepend_embeds` is {shown(flag)}; they are True or False.")
    if transform is not None and not callable(transform):
        raise InputError(f"`transform_token_embeds` is {shown(transform)}; it must be a function.")
    for given in keywords:
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"`token_emb_kwargs` or `to_logits_kwargs` is {shown(given)}; it must be a mapping.")


def z_loss_weight(default: float, requested: bool, given: float | None) -> float | None:
    """Return the weight of the z-loss of a pass, or None if it is not requested.

    Args:
        default: weight of the model.
        requested: the z-loss is to be returned.
        given: weight of the pass, or None.
    """
    if not requested:
        return None
    return default if given is None else given


@dataclass(eq=False)
class TokenSpan:
    """The new tokens of a pass.

    Attributes:
        count: number of new tokens.
        given: number of tokens that the caller gave, including those that are cached.
        first: index of the first new token in its row; a tensor on the device for a static cache.
        leading: number of class tokens and prepended embeddings that this pass puts in front of them.
        kv: the cache, or None.
        starts: whether nothing was cached before this pass.
    """

    count: int
    given: int
    first: int | Tensor
    leading: int
    kv: KVCache | None
    starts: bool

    def newest(self, t: Tensor, dim: int) -> Tensor:
        """Return the part of a per-token tensor that covers the new tokens.

        Args:
            t: a tensor over the new tokens, over the tokens given, or over all tokens so far.
            dim: its axis of tokens.

        Raises:
            ShapeError: if it covers none of these.
        """
        covered = t.shape[dim]
        if covered == self.count:
            return t
        so_far = self.so_far
        if covered < self.count or covered not in (self.given, so_far if so_far is not None else covered):
            raise ShapeError(
                f"a tensor over {covered} tokens was given for {self.count} new tokens; it must cover them, or all "
                "tokens so far."
            )
        return t.narrow(dim, covered - self.count, self.count)

    @property
    def so_far(self) -> int | None:
        """Number of tokens up to the last new one; None if only the device knows it, as for a started static cache."""
        return self.count if self.kv is None else self.kv.count_tokens_with(self.count)

    def valid(self, batch: int, mask: Tensor | None, start: Tensor | None, device: torch.device) -> Tensor | None:
        """Return `(b, n)` bool, False at padding, for pooling over the new tokens; None if all are valid.

        Args:
            batch: number of rows b.
            mask: the caller's mask over tokens.
            start: `(b,)` number of tokens of left padding.
            device: of the result.
        """
        valid = None if mask is None else self.newest(mask, -1)
        if start is not None:
            after_padding = torch.arange(self.count, device=device) >= start.unsqueeze(-1)
            valid = after_padding if valid is None else valid & after_padding
        if valid is None and self.count == 0:
            return torch.ones(batch, 0, dtype=torch.bool, device=device)
        return valid


def same_for_all_tokens(embeds: Tensor) -> bool:
    """Return True if embeddings are one number, one vector, or one vector for each row: `()`, `(E,)` or `(b, 1, E)`."""
    return embeds.ndim < 2 or embeds.shape[-2] == 1


def new_tokens(n: int, kv: KVCache, inputs: ModelInputs, leading: int, layout: MemoryLayout) -> TokenSpan:
    """Return which of the n tokens that a caller gave are new to the cache.

    Args:
        n: number of tokens given: the whole sequence, or those after what is cached.
        kv: the cache.
        inputs: of the pass; `cache_age` limits the number of tokens that run.
        leading: number of items before the tokens.
        layout: memory tokens of the model.

    Raises:
        InputError: if there are fewer tokens than should run, or none.
    """
    held, only_new = kv.tokens - kv.prepended, inputs.input_not_include_cache
    first = kv.count_tokens(layout.every is not None)
    if only_new and n > 0 and inputs.cache_age is None:
        return TokenSpan(n, n, first, leading, kv, not kv.started)
    if not only_new:
        kv.refuse_whole_sequence()
    count, new = tokens_to_run(n, held, inputs.cache_age, only_new=only_new, fewest=0 if leading > 0 else 1)
    # tokens that a limit leaves out keep their positions, unless x is too short to say which they are
    skipped = new - count if only_new or n > held else 0
    return TokenSpan(count, n, first + skipped if skipped > 0 else first, leading, kv, not kv.started)
