"""Prompts as one batch: rows of different lengths are right-aligned, so that all of them continue at one column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from x_transformers.errors import InputError, ShapeError, TokenRangeError
from x_transformers.models.embeddings import whole_numbers
from x_transformers.options.values import shown


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of a batch.

    Attributes:
        tokens: `(b, n)` ids; every row's prompt ends in the last column.
        start: `(b,)` number of padding tokens on the left of each row, or None if there are none.
        lens: `(b,)` number of tokens of each row that were its prompt, or None if all were.
        width: number of columns of the caller's tensor, and of per-token arguments.
        lead: the caller's axes before the last one.
    """

    tokens: Tensor
    start: Tensor | None
    lens: Tensor | None
    width: int
    lead: tuple[int, ...]

    def align(self, t: Tensor, value: float | bool) -> Tensor:
        """Move a per-token tensor `(b, width)` as the prompts were moved: `(b, n)`."""
        if self.lens is None:
            return t
        # columns that are padding in every row were removed from the prompts, and so must be here
        return align_right(t.expand(len(self.lens), -1), self.lens, value)[:, self.width - self.tokens.shape[1] :]


def read_prompts(
    prompts: Tensor | Sequence[Tensor],
    prompt_lens: Tensor | Sequence[int] | None,
    pad_value: int,
    vocabulary: int,
    may_be_empty: bool = False,
) -> Prompts:
    """Check the caller's prompts, and align them. The ids are read once, on every device.

    Args:
        prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
        prompt_lens: `(...)` number of tokens of each row of `prompts`, from the left, that are its prompt.
        pad_value: the id that fills shorter rows.
        vocabulary: number of ids.
        may_be_empty: allow prompts of no tokens.

    Raises:
        InputError: with what was given and what is needed.
    """
    lead: tuple[int, ...]
    if isinstance(prompts, Tensor):
        tokens, lead = _rows(prompts)
        lens = None if prompt_lens is None else _lengths(prompt_lens, tokens)
    else:
        tokens, lens = _stack(prompts, prompt_lens, pad_value)
        lead = (len(lens),)
    width = tokens.shape[1]
    least, most = (width, width) if lens is None else (min(lens), max(lens))
    if most == 0 and not may_be_empty:
        raise InputError("a prompt is empty; begin with at least one token, for example one that means `start`.")
    if least == 0 and most:
        raise InputError("one prompt of the batch is empty and others are not; begin each with at least one token.")
    counts = start = None
    if least < width:
        if not 0 <= pad_value < vocabulary:
            raise TokenRangeError(
                f"`pad_value` is {pad_value}; it fills up the shorter prompts and must be an id of the vocabulary, "
                f"0 to {vocabulary - 1}."
            )
        counts = torch.tensor(lens, device=tokens.device)
        start = most - counts if least < most else None
        tokens = align_right(tokens, counts, pad_value)[:, width - most :]
    _check_range(tokens, vocabulary)
    return Prompts(tokens, start, counts, width, lead)


def align_right(t: Tensor, lens: Tensor, pad_id: float = 0) -> Tensor:
    """Move the first `lens[r]` entries of each row r to its right end, and fill with `pad_id`.

    Args:
        t: `(b, n, ...)`.
        lens: `(b,)`.
        pad_id: value on the left.

    Raises:
        ShapeError: if `lens` is not `(b,)`.
        InputError: if a length exceeds n or is negative.
    """
    batch, n = t.shape[:2]
    if lens.shape != (batch,):
        raise ShapeError(f"`lens` has shape {tuple(lens.shape)}; it must be ({batch},), a length for each row.")
    if bool(((lens < 0) | (lens > n)).any()):
        raise InputError(f"`lens` holds {lens.tolist()}; the rows have {n} entries.")
    # column c of the result comes from column c - (n - length); negative ones are padding
    source = torch.arange(n, device=t.device) - (n - lens.to(t.device)).unsqueeze(-1)
    index = source.clamp(min=0)
    filling = source < 0
    for _ in t.shape[2:]:
        index, filling = index.unsqueeze(-1), filling.unsqueeze(-1)
    return t.gather(1, index.expand_as(t)).masked_fill(filling, pad_id)


def pad_at_dim(t: Tensor, pad: tuple[int, int], dim: int = -1, value: float = 0.0) -> Tensor:
    """Pad an axis with a constant.

    Args:
        t: any tensor.
        pad: `(left, right)` number of entries.
        dim: the axis.
        value: of the new entries.
    """
    later_axes = t.ndim - 1 - dim if dim >= 0 else -dim - 1
    return F.pad(t, (*(0, 0) * later_axes, *pad), value=value)


def _rows(prompts: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return `(..., n)` as `(b, n)`, and the axes that were folded."""
    prompts = whole_numbers(prompts, "`prompts` has")
    if prompts.ndim == 0:
        raise ShapeError("`prompts` is a single number; it must have an axis of tokens: (n,) or (..., n).")
    lead = tuple(prompts.shape[:-1])
    rows = math.prod(lead)
    if rows == 0:
        raise ShapeError(f"`prompts` has shape {tuple(prompts.shape)}, which is no prompt at all; give at least one.")
    return prompts.reshape(rows, prompts.shape[-1]).long(), lead


def _stack(
    prompts: Sequence[Tensor], prompt_lens: Tensor | Sequence[int] | None, pad_value: int
) -> tuple[Tensor, list[int]]:
    """Return a list of prompts as `(b, n)`, still left-aligned, and their lengths."""
    if len(prompts) == 0:
        raise InputError("`prompts` is an empty list; give at least one prompt.")
    if prompt_lens is not None:
        raise InputError("the prompts are a list, which has their lengths; drop `prompt_lens`.")
    prompts = [whole_numbers(prompt, "`prompts` has") for prompt in prompts]
    for prompt in prompts:
        if prompt.ndim != 1:
            raise ShapeError(f"a prompt of the list has shape {tuple(prompt.shape)}; each must be (n,).")
    tokens = pad_sequence([prompt.long() for prompt in prompts], batch_first=True, padding_value=pad_value)
    return tokens, [len(prompt) for prompt in prompts]


def _lengths(prompt_lens: Tensor | Sequence[int], tokens: Tensor) -> list[int]:
    """Return `prompt_lens` as numbers, one for each row."""
    try:
        given = torch.as_tensor(prompt_lens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"`prompt_lens` is {shown(prompt_lens)}; it must hold a length for each prompt.") from error
    if given.is_floating_point() or given.is_complex() or given.dtype is torch.bool:
        raise InputError(f"`prompt_lens` has dtype {given.dtype}; it must be of an integer type.")
    lens = given.flatten().tolist()
    batch, n = tokens.shape
    if len(lens) != batch:
        raise ShapeError(f"`prompt_lens` holds {len(lens)} lengths; there are {batch} prompts.")
    if min(lens) < 0 or max(lens) > n:
        raise InputError(f"`prompt_lens` runs from {min(lens)} to {max(lens)}; the prompts have {n} columns.")
    return lens


def _check_range(tokens: Tensor, vocabulary: int) -> None:
    if tokens.numel() == 0:
        return
    least, most = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or most >= vocabulary:
        raise TokenRangeError(
            f"the prompts hold ids from {least} to {most}; this model's vocabulary runs from 0 to {vocabulary - 1}."
        )
