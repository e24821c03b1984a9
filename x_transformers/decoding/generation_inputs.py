"""Arguments of a net's passes, given once by the caller, for a sequence that grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import read_mask
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.inputs import same_for_all_tokens
from x_transformers.options.values import accepts, shown

_REFUSED = {
    "seq_start_pos": "give `prompt_lens`, or the prompts as a list",
    "cache_age": "new tokens are counted here",
    "input_not_include_cache": "the net is fed whatever it needs",
    "early_exit": "give `exit_confidence`, and perhaps `exit_measure` and `exit_layers`",
    "attn_mask": "it covers a fixed number of tokens; give `mask` or `self_attn_kv_mask`",
    "attn_bias": "it covers a fixed number of tokens; build a position bias into the stack",
}

# The axis of rows; a tensor without it is the same for all of them.
_ROW_AXIS = {
    "mask": -2,
    "self_attn_kv_mask": -2,
    "pos": -2,
    "sum_embeds": -3,
    "embed_ids": -2,
    "prepend_embeds": -3,
    "prepend_mask": -2,
    "context": -3,
    "context_mask": -2,
    "context_pos": -2,
    "mems": -3,
    "mem_masks": -2,
    "self_attn_additional_kv": -4,
    "additional_kv_mask": -2,
    "prefix_attn_len": -1,
    "condition": 0,
    "in_attn_cond": 0,
    "cross_attn_kv_residuals": -3,
}

EmbedIds = Mapping[str, Any] | Callable[[Tensor], Mapping[str, Any]]
"""Name -> ids, or a function of the tokens; each of the ids may be such a function, too."""

Growing = Callable[[int, int, Mapping[str, Any]], dict[str, Any]]
"""First and last item of a pass, and its other arguments, to further ones."""


class Arguments:
    """Keyword arguments of a net's passes.

    Masks cover the prompts and continue with True. Other arguments over tokens must cover generated ones too: `pos`,
    `sum_embeds` and `embed_ids` cover the final length, or `embed_ids` are functions of the tokens so far. Everything
    else is the same in each pass.

    Args:
        kwargs: as the caller gave them.
        width: columns of the caller's prompts.
        final: total number of tokens that will be read.
        align: moves a mask `(b, width)` as the prompts were moved, or None if they were not.
        growing: `(first, last, others)` to further arguments over these items, of what grows next to the sequence, from
            the other arguments of the pass.

    Attributes:
        constant: arguments that are the same in each pass.
        fixed: there are no others.

    Raises:
        InputError: naming an argument that cannot be continued, and what to give instead.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        width: int,
        final: int,
        align: Callable[[Tensor], Tensor] | None = None,
        growing: Growing | None = None,
    ) -> None:
        _check_names(kwargs)
        self.constant = {name: value for name, value in kwargs.items() if value is not None}
        self.constant.pop("excise_prepend_embeds", None)  # logits after the last token do not change
        self.growing = growing
        self.masks: dict[str, Tensor] = {}
        for name in ("mask", "self_attn_kv_mask"):
            if name in self.constant:
                mask = _check_mask(self.constant.pop(name), width, name)
                self.masks[name] = mask if align is None else align(mask)
        self.covering: dict[str, Tensor] = {}
        for name in ("pos", "sum_embeds"):
            if name in self.constant and not _is_constant(self.constant[name]):
                t = self.constant.pop(name)
                if not isinstance(t, Tensor):
                    raise InputError(f"`{name}` is {shown(t)}; it must be a tensor.")
                _check_covers(name, t, _token_axis(t), final, align is None)
                self.covering[name] = t
        self.embed_ids: EmbedIds = self.constant.pop("embed_ids", {})
        if isinstance(self.embed_ids, Mapping):
            for name, ids in self.embed_ids.items():
                if isinstance(ids, Tensor):
                    _check_covers(f"embed_ids[{name!r}]", ids, -1, final, align is None)
        self.fixed = not (self.masks or self.covering or self.embed_ids) and growing is None

    def at(
        self, length: int, tokens: Callable[[], Tensor], *, first: int, new: int, keep_masks: bool = False
    ) -> dict[str, Any]:
        """Return the arguments of a pass.

        Args:
            length: number of tokens so far.
            tokens: returns them, `(b, length)`.
            first: the first of them that the net has read or reads.
            new: number of tokens that it reads.
            keep_masks: let masks end with the prompt, as a static cache allows.
        """
        arguments = dict(self.constant)
        for name, mask in self.masks.items():
            # a static cache takes places beyond the mask as valid, so that the mask keeps one shape and steps one graph
            grown = 0 if keep_masks else length - mask.shape[1]
            arguments[name] = (F.pad(mask, (0, grown), value=True) if grown else mask)[:, first:]
        for name, t in self.covering.items():
            # the positions of each head become a bias, which needs those of all keys
            begin = first if _is_by_head(t) else length - new
            arguments[name] = t.narrow(_token_axis(t), begin, length - begin).contiguous()
        if self.embed_ids:
            given = self.embed_ids if isinstance(self.embed_ids, Mapping) else self.embed_ids(tokens())
            ids = {name: t if isinstance(t, Tensor) else t(tokens()) for name, t in given.items()}
            arguments["embed_ids"] = {name: t[:, length - new : length].contiguous() for name, t in ids.items()}
        if self.growing is not None:
            arguments |= self.growing(length - new, length, arguments)
        return arguments

    def widen(self, times: int) -> None:
        """Repeat whatever belongs to a row `times` times.

        Raises:
            InputError: naming an argument whose axis of rows is not known.
        """
        if times == 1:
            return
        for arguments in (self.constant, self.masks, self.covering):
            for name, value in arguments.items():
                arguments[name] = _widened(name, value, times)
        if isinstance(self.embed_ids, Mapping):
            self.embed_ids = {
                name: _widened("embed_ids", ids, times) if isinstance(ids, Tensor) else ids
                for name, ids in self.embed_ids.items()
            }

    def forget_prepended(self) -> None:
        """Drop prepended embeddings, which are in the cache now."""
        for name in ("prepend_embeds", "prepend_mask"):
            self.constant.pop(name, None)


def _widened(name: str, value: Any, times: int) -> Any:
    """Return a value with each row repeated; a single row that serves all of them is not."""
    return with_rows(name, value, lambda t, axis: t.repeat_interleave(times, dim=axis))


def with_rows(name: str, value: Any, fn: Callable[[Tensor, int], Tensor]) -> Any:
    """Return an argument of a pass with other rows; a single row that serves all of them is left as it is.

    Args:
        name: of the argument, which says which axis is that of rows.
        value: the argument; of a list or tuple each item.
        fn: tensor and axis to the tensor with other rows.

    Raises:
        InputError: for tensors whose axis of rows is not known.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(name, item, fn) for item in value)
    if isinstance(value, LayerIntermediates):
        raise InputError(f"`{name}` is a record, whose rows cannot be repeated; give pairs of tensors.")
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    axis = _ROW_AXIS.get(name)
    if axis is None:
        raise InputError(f"`{name}` is a tensor of which it is not known which axis is that of rows; drop it.")
    if name == "pos" and (value.is_floating_point() or _is_by_head(value)):
        axis = -3  # embeddings of positions, or positions of each head
    if value.ndim < -axis or value.shape[axis] == 1:
        return value
    return fn(value, axis)


def _is_by_head(t: Tensor) -> bool:
    """Return True for positions `(b, h, n)` that differ between heads."""
    return t.ndim == 3 and not t.is_floating_point()


def _token_axis(t: Tensor) -> int:
    """Return the axis of tokens: embeddings `(..., n, E)` are floating, positions `(..., n)` are not."""
    return -2 if t.is_floating_point() else -1


def cut_arguments(kwargs: Mapping[str, Any], first: int, last: int, n: int) -> dict[str, Any]:
    """Cut arguments over n tokens, or all but the last one, to those of a pass over tokens `first` to `last`.

    Raises:
        ShapeError: naming an argument that covers another number of tokens.
    """
    arguments = dict(kwargs)
    for name in ("mask", "self_attn_kv_mask", "pos", "sum_embeds"):
        if arguments.get(name) is not None:
            arguments[name] = _cut(name, arguments[name], first, last, n)
    if arguments.get("embed_ids"):
        ids = arguments["embed_ids"].items()
        arguments["embed_ids"] = {name: _cut(f"embed_ids[{name!r}]", t, first, last, n) for name, t in ids}
    for name in ("condition", "in_attn_cond"):
        t = arguments.get(name)
        if t is not None and t.ndim == 3 and t.shape[1] > 1:
            arguments[name] = _cut(name, t, first, last, n)
    return arguments


def _is_constant(t: Tensor | float | None) -> bool:
    """Return True if an argument is the same for all tokens: None, a number, or a single embedding."""
    return not isinstance(t, Tensor) or (t.is_floating_point() and same_for_all_tokens(t))


def _cut(name: str, t: Tensor, first: int, last: int, n: int) -> Tensor:
    if _is_constant(t):
        return t
    axis = _token_axis(t)
    if t.shape[axis] not in (n, n - 1):
        raise ShapeError(f"`{name}` has shape {tuple(t.shape)}; it must cover the {n} tokens of x.")
    return t.narrow(axis, first, min(last, t.shape[axis]) - first)


def check_seq_len(seq_len: Any) -> None:
    """Raise an `InputError` unless `seq_len` counts tokens."""
    if not accepts(int, seq_len) or seq_len < 0:
        raise InputError(f"`seq_len` is {shown(seq_len)}; it is how many tokens to generate, a whole number, >= 0.")


def check_length_and_end(seq_len: Any, eos_token: int | None, vocabulary: int) -> None:
    """Raise an `InputError` unless `seq_len` counts tokens and `eos_token` is one."""
    check_seq_len(seq_len)
    if isinstance(eos_token, Mapping | Sequence):
        raise InputError(f"`eos_token` is {shown(eos_token)}; it is a single id. End at one of several yourself.")
    if eos_token is not None and not (accepts(int, eos_token) and 0 <= eos_token < vocabulary):
        raise InputError(f"`eos_token` is {shown(eos_token)}; the vocabulary runs from 0 to {vocabulary - 1}.")


def _check_names(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in _REFUSED:
            raise InputError(f"`{name}` cannot be given to generation: {_REFUSED[name]}.")
        if name.startswith("return_"):
            raise InputError(f"`{name}` cannot be given to generation, which returns tokens; call the net itself.")


def _check_mask(mask: Tensor, width: int, name: str) -> Tensor:
    mask = read_mask(mask, name)
    if mask.ndim != 2 or mask.shape[1] != width:
        raise InputError(
            f"`{name}` has shape {tuple(mask.shape)}; it must have a value for each of the prompts' {width} columns. "
            "Generated tokens are always valid."
        )
    return mask


def _check_covers(name: str, t: Tensor, axis: int, final: int, one_length: bool) -> None:
    if t.ndim < -axis:
        raise InputError(f"`{name}` has shape {tuple(t.shape)}; it must have an axis of tokens.")
    if not one_length:
        raise InputError(f"`{name}` cannot follow prompts of different lengths; `embed_ids` may be functions of ids.")
    if t.shape[axis] < final:
        raise InputError(
            f"`{name}` has shape {tuple(t.shape)}; it must cover the {final} tokens that are read, generated ones "
            "included. `embed_ids` may also be functions of the ids so far."
        )
