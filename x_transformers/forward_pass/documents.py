"""Packed rows: several documents in one row, one after the other, each of which sees only itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.ops import values_can_be_read

NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@dataclass(frozen=True, eq=False)
class Documents:
    """Boundaries of the documents of a packed row. Document t of the queries sees document t of the keys.

    Attributes:
        starts_q, starts_k: `(t + 1,)` int32, the first query and the first key of each document, then the number of
            queries and keys.
        longest_q, longest_k: at least the length of the longest document.
    """

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int

    def places(self, n: int) -> Tensor:
        """Return `(1, n)`, the index of each query within its document."""
        row = torch.arange(n, device=self.starts_q.device)
        return (row - self.starts_q[_owners(self.starts_q, n)]).unsqueeze(0)

    def aligned(self, n: int) -> Tensor:
        """Return `(n,)`, the index within its document of the last key that each causal query sees; negative for none.

        Causality is right-aligned: the last query of a document sees its last key.
        """
        owner = _owners(self.starts_q, n)
        # the shift moves the end of a document of queries to the end of its document of keys: right-aligned
        shift = self.starts_k[owner + 1] - self.starts_q[owner + 1]
        return torch.arange(n, device=owner.device) + shift - self.starts_k[owner]

    def owners(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return `(i,)` and `(j,)`, the number of the document of each query and key."""
        return _owners(self.starts_q, i), _owners(self.starts_k, j)

    def slots(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return `(i,)` and `(j,)`, the index of queries (right-aligned) and keys among the keys of their document."""
        owner = _owners(self.starts_k, j)
        return self.aligned(i), torch.arange(j, device=owner.device) - self.starts_k[owner]

    def fully_masked(self, i: int, *, causal: bool) -> Tensor:
        """Return `(1, 1, i, 1)` bool, True for queries that see no key."""
        owner = _owners(self.starts_q, i)
        nothing = self.starts_k[owner + 1] == self.starts_k[owner]
        if causal:
            nothing = nothing | (self.aligned(i) < 0)
        return nothing[None, None, :, None]


def _owners(starts: Tensor, n: int) -> Tensor:
    """Return `(n,)`, the number of the document that each token belongs to; empty documents have no token."""
    row = torch.arange(n, device=starts.device, dtype=starts.dtype)
    # The number of documents that end at or before the token. `starts` may repeat a number (an empty document), and
    # with `right=True` such documents are passed over.
    return torch.searchsorted(starts[1:].contiguous(), row, right=True)


def check_packing(given: Any, *, packed: bool, cached: bool, name: str, keyword: str) -> None:
    """Raise an `InputError` unless documents are given exactly if the layers keep them apart.

    Args:
        given: the documents that the caller specifies, or None.
        packed: the layers keep documents apart.
        cached: the pass has a cache, each row of which is one document.
        name: name of the argument.
        keyword: name of the option.
    """
    if given is not None and not packed:
        raise InputError(f"`{name}` packs documents into one row; build the model with `{keyword} = True`.")
    if given is not None and cached:
        raise InputError(f"`{name}` packs documents into one row, and each row of a cache is one document; drop it.")
    if given is None and packed and not cached:
        raise InputError(
            f"`{keyword} = True` keeps the documents of a packed row apart; pass `{name}` with "
            f"{', '.join(f'`{each}`' for each in NAMES)} at every call without a cache."
        )


def refuse_beside(name: str, **given: Any) -> None:
    """Raise an `InputError` if an argument is given that documents exclude."""
    for other, value in given.items():
        if value is not None:
            raise InputError(
                f"`{name}` says which tokens see each other, and packed rows have no padding; drop `{other}`."
            )


def documents_of(given: Any, *, batch: int, queries: int, keys: int | None, name: str) -> Documents:
    """Return the documents that a caller specifies.

    Args:
        given: `cu_seqlens_q`, `cu_seqlens_k`, `max_seqlen_q` and `max_seqlen_k`, as variable-length kernels take them.
        batch: number of rows of the pass.
        queries: number of queries.
        keys: number of keys; None: the keys are the queries.
        name: name of the argument.

    Raises:
        InputError: if names are missing or the boundaries are invalid. Boundaries on a GPU are not checked, since that
            would wait for the device.
        ShapeError: if there is more than one row.
    """
    if not isinstance(given, Mapping) or sorted(given) != sorted(NAMES):
        got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(f"`{name}` is {got}; it must be a dict of {', '.join(f'`{each}`' for each in NAMES)}.")
    if batch != 1:
        raise ShapeError(f"`{name}` packs documents into one row, but x has {batch} rows; concatenate them.")
    starts_q, starts_k = (_starts(given, f"cu_seqlens_{each}", name) for each in "qk")
    if len(starts_q) != len(starts_k):
        raise InputError(
            f"`{name}` has {len(starts_q) - 1} documents of queries and {len(starts_k) - 1} of keys; a document of "
            "queries sees the document of keys of the same number."
        )
    longest = [_longest(given[f"max_seqlen_{each}"], f"max_seqlen_{each}", name) for each in "qk"]
    documents = Documents(starts_q, starts_k, *longest)
    if values_can_be_read() and starts_q.device.type == starts_k.device.type == "cpu":
        _check(documents, queries, queries if keys is None else keys, name)
        if keys is None and not torch.equal(starts_q, starts_k):
            raise InputError(
                f"`{name}` divides queries and keys differently; in self-attention they are the same tokens, so that "
                "`cu_seqlens_q` and `cu_seqlens_k` must be equal."
            )
    return documents


def _starts(given: Mapping[str, Any], key: str, name: str) -> Tensor:
    starts = given[key]
    if not isinstance(starts, Tensor) or starts.ndim != 1 or len(starts) < 2 or starts.dtype not in WHOLE:
        raise InputError(
            f"`{key}` of `{name}` must be a tensor of at least 2 whole numbers: 0, and the end of each document."
        )
    return starts.to(torch.int32)


WHOLE = (torch.int32, torch.int64)


def _longest(length: Any, key: str, name: str) -> int:
    if isinstance(length, Tensor):
        length = int(length)
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 0:
        raise InputError(f"`{key}` of `{name}` is {length!r}; it must be the length of the longest document.")
    return length  # type: ignore[return-value]


def _check(documents: Documents, queries: int, keys: int, name: str) -> None:
    for key, starts, longest, tokens in (
        ("q", documents.starts_q, documents.longest_q, queries),
        ("k", documents.starts_k, documents.longest_k, keys),
    ):
        lengths = starts.diff()
        if starts[0] != 0 or starts[-1] != tokens or (lengths < 0).any():
            raise InputError(
                f"`cu_seqlens_{key}` of `{name}` is {starts.tolist()}; it must rise from 0 to the number of tokens, "
                f"{tokens}."
            )
        if lengths.max() > longest:
            raise InputError(
                f"`max_seqlen_{key}` of `{name}` is {longest}, but the longest document has {int(lengths.max())} "
                "tokens."
            )
