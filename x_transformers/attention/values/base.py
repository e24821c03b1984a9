"""Runs any sequence module over ragged batches and piece by piece, with its state in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from x_transformers.cache import Entry


@dataclass(frozen=True, eq=False)
class SequenceState:
    """State of a sequence module after the tokens so far.

    Attributes:
        leaves: the tensors of the state, `(b, rows, ...)`, by their path: `hybrid` for a single tensor, `hybrid/0`,
            `hybrid/1/0`, ... for those of nested tuples.
        count: `(b,)` number of tokens so far.
    """

    leaves: Mapping[str, Tensor]
    count: Tensor

    @classmethod
    def read(cls, entry: Entry) -> SequenceState | None:
        """Return the state in a cache, or None if there is none yet."""
        count = entry.get("seen_by_hybrid")
        if count is None:
            return None
        return cls({name: t for name, t in entry.states.items() if name.split("/")[0] == "hybrid"}, count)

    def write(self, entry: Entry) -> None:
        """Store the state in a cache."""
        entry.put("seen_by_hybrid", self.count)
        for name, leaf in self.leaves.items():
            entry.put(name, leaf)


class SequenceRunner:
    """Runs a module over sequences, each folded into `rows` rows: token t goes to place `t // rows` of row `t % rows`.

    Args:
        module: maps `(b, n, D)`, and its state if there is one, to an output `(b, n, e)` or `(b, h, n, e)`, or to a
            pair of that and its new state.
        rows: number of rows of a sequence; 1 leaves sequences whole.
        batch_axis: the batch axis of the tensors in the state.
    """

    def __init__(self, module: nn.Module, rows: int, batch_axis: int) -> None:
        self.module, self.rows, self.batch_axis = module, rows, batch_axis

    def run_batch(
        self, x: Tensor, state: SequenceState | None, **masks: Tensor | None
    ) -> tuple[Tensor, SequenceState | None]:
        """Run over all tokens of all sequences at once; rows that are too short are padded with zeros on the right.

        Args:
            x: `(b, n, D)`.
            state: state after an earlier call; must be None if there are several rows.
            masks: further keywords of the module, `(b, n)` bool.

        Returns:
            the output `(b, n, e)`, and the new state if the module has one.
        """
        n, folded = x.shape[1], {name: None if t is None else self._fold(t) for name, t in masks.items()}
        leaves = None if state is None else {k: t.flatten(0, 1) for k, t in state.leaves.items()}
        y, leaves = self._call(self._fold(x), leaves, folded)
        y = rearrange(y, "(b r) n e -> b (n r) e", r=self.rows)[:, :n]
        if leaves is None:
            return y, None
        before = 0 if state is None else state.count
        count = torch.full((x.shape[0],), n, device=x.device) + before
        leaves = {k: rearrange(t, "(b r) ... -> b r ...", r=self.rows) for k, t in leaves.items()}
        return y, SequenceState(leaves, count)

    def run_ragged(
        self, x: Tensor, token_mask: Tensor | None, state: SequenceState | None, pad: bool
    ) -> tuple[Tensor, SequenceState | None]:
        """Run over the visible tokens of each sequence only, rows of the same length together.

        Args:
            x: `(b, n, D)`.
            token_mask: `(b, n)` bool, True for tokens that the module sees; None if it sees all.
            state: state after an earlier call.
            pad: pad the rows of one sequence with zeros to the same length.

        Returns:
            the output `(b, n, e)`, 0 where a token is hidden, and the new state if the module has one.
        """
        token_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if token_mask is None else token_mask
        count = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if state is None else state.count
        leaves = {} if state is None else {name: t.clone() for name, t in state.leaves.items()}
        y: Tensor | None = None
        for length, started, pieces in self._group_rows(token_mask, count, pad):
            inputs = torch.stack([_pad_right(x[b, at], length) for b, _, at in pieces])
            bs, rs = [b for b, _, _ in pieces], [r for _, r, _ in pieces]
            out, new_leaves = self._call(inputs, {k: t[bs, rs] for k, t in leaves.items()} if started else None, {})
            y = x.new_zeros(*x.shape[:2], out.shape[-1], dtype=out.dtype) if y is None else y
            for (b, _, at), row in zip(pieces, out, strict=True):
                y = y.index_put((torch.full_like(at, b), at), row[: len(at)])
            for name, t in (new_leaves or {}).items():
                leaf = leaves.get(name)
                leaf = t.new_zeros(x.shape[0], self.rows, *t.shape[1:]) if leaf is None else leaf
                leaves[name] = leaf.index_put((torch.tensor(bs, device=t.device), torch.tensor(rs, device=t.device)), t)
        if y is None:  # every token is hidden: run one, only to learn the width of the output
            y = torch.zeros_like(self._call(x[:, :1], None, {})[0]).expand(-1, x.shape[1], -1)
        return y, SequenceState(leaves, count + token_mask.sum(dim=-1)) if leaves else None

    def _group_rows(
        self, token_mask: Tensor, count: Tensor, pad: bool
    ) -> Iterator[tuple[int, bool, list[tuple[int, int, Tensor]]]]:
        """Group rows that can run in one batch: those of the same length, with a state or all without.

        Yields:
            the length, whether the rows have a state, and for each row its batch index, its number and its tokens.
        """
        groups: dict[tuple[int, bool], list[tuple[int, int, Tensor]]] = {}
        for b, earlier in enumerate(count.tolist()):
            tokens = token_mask[b].nonzero().flatten()
            for row in range(self.rows):
                # the first of these tokens is number `earlier` of its sequence, so it goes to row `earlier % rows`
                at = tokens[(row - earlier) % self.rows :: self.rows]
                length = -(-len(tokens) // self.rows) if pad else len(at)
                # tokens are dealt in turn, so that row r has a state once more than r tokens have been dealt
                if length:
                    groups.setdefault((length, earlier > row), []).append((b, row, at))
        for (length, started), pieces in groups.items():
            yield length, started, pieces

    def _call(
        self, x: Tensor, leaves: Mapping[str, Tensor] | None, masks: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Call the module; return its output `(b, n, h * e)` and the tensors of its state, batch axis first."""
        states = () if leaves is None else (_unflatten({k: t.movedim(0, self.batch_axis) for k, t in leaves.items()}),)
        result = self.module(x, *states, **masks)
        results = result if isinstance(result, tuple) else (result,)
        out, state = results[0], results[1] if len(results) > 1 else None
        out = rearrange(out, "b h n e -> b n (h e)") if out.ndim == 4 else out
        flat = {name: t.movedim(self.batch_axis, 0) for name, t in _flatten(state)}
        return out, flat or None

    def _fold(self, t: Tensor) -> Tensor:
        """Deal the tokens of `(b, n, ...)` to the rows of their sequences: `(b rows, n', ...)`."""
        padding = t.new_zeros(t.shape[0], -t.shape[1] % self.rows, *t.shape[2:])
        return rearrange(torch.cat((t, padding), dim=1), "b (n r) ... -> (b r) n ...", r=self.rows)


def _pad_right(t: Tensor, length: int) -> Tensor:
    return torch.cat((t, t.new_zeros(length - len(t), *t.shape[1:])))


def _flatten(state: Any, name: str = "hybrid") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested tuples, each with its path."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, (tuple, list)):
        for index, part in enumerate(state):
            yield from _flatten(part, f"{name}/{index}")


def _unflatten(leaves: Mapping[str, Tensor], name: str = "hybrid") -> Any:
    """Return the nested tuples of which `_flatten` yields these tensors."""
    if name in leaves:
        return leaves[name]
    count = len({key[len(name) + 1 :].split("/")[0] for key in leaves if key.startswith(f"{name}/")})
    return tuple(_unflatten(leaves, f"{name}/{index}") for index in range(count))
