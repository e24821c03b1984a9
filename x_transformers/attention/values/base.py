"""Running any sequence module over tokens of which some do not count, piece by piece, with its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import Entry


@dataclass(frozen=True, eq=False)
class SequenceState:
    """What a sequence module remembers.

    Attributes:
        leaves: its state's tensors, `(b, rows, ...)`, by their place in it: `hybrid`, or `hybrid/0`, `hybrid/1` ...
        count: `(b,)` how many tokens it has seen.
    """

    leaves: Mapping[str, Tensor]
    count: Tensor

    @classmethod
    def of(cls, entry: Entry) -> SequenceState | None:
        """The state in a cache, if there is one."""
        count = entry.get("seen_by_hybrid")
        if count is None:
            return None
        return cls({name: t for name, t in entry.states.items() if name.split("/")[0] == "hybrid"}, count)

    def put(self, entry: Entry) -> None:
        """Keep it in a cache."""
        entry.put("seen_by_hybrid", self.count)
        for name, leaf in self.leaves.items():
            entry.put(name, leaf)


class SequenceRunner:
    """Runs a module over sequences whose tokens are dealt to `rows` sequences of it each.

    Args:
        module: `(b, n, D)` and perhaps its state to an output, `(b, n, e)` or `(b, h, n, e)`, and perhaps its state.
        rows: token t of a sequence goes to place `t // rows` of its row `t % rows`.
        batch_axis: of the state's tensors.
    """

    def __init__(self, module: nn.Module, rows: int, batch_axis: int) -> None:
        self.module, self.rows, self.batch_axis = module, rows, batch_axis

    def whole(
        self, x: Tensor, state: SequenceState | None, **masks: Tensor | None
    ) -> tuple[Tensor, SequenceState | None]:
        """Run over all tokens at once. With several rows, zeros fill up on the right.

        Args:
            x: `(b, n, D)`.
            state: of an earlier call; with several rows, None.
            masks: `(b, n)` bool, further keywords of the module.
        """
        n, dealt = x.shape[1], {name: None if t is None else self._deal(t) for name, t in masks.items()}
        y, leaves = self._call(
            self._deal(x), None if state is None else {k: t.flatten(0, 1) for k, t in state.leaves.items()}, dealt
        )
        y = y.unflatten(0, (-1, self.rows)).transpose(1, 2).flatten(1, 2)[:, :n]
        if leaves is None:
            return y, None
        before = 0 if state is None else state.count
        count = torch.full((len(x),), n, device=x.device) + before
        return y, SequenceState({k: t.unflatten(0, (-1, self.rows)) for k, t in leaves.items()}, count)

    def ragged(
        self, x: Tensor, live: Tensor | None, state: SequenceState | None, pad: bool
    ) -> tuple[Tensor, SequenceState | None]:
        """Run each sequence over those of its tokens that count, sequences of one length together; 0 elsewhere.

        Args:
            x: `(b, n, D)`.
            live: `(b, n)` bool, which tokens count; None for all.
            state: of an earlier call.
            pad: fill rows up with zeros, so that those of one sequence are of one length.
        """
        live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if live is None else live
        count = torch.zeros(len(x), dtype=torch.long, device=x.device) if state is None else state.count
        leaves = {} if state is None else {name: t.clone() for name, t in state.leaves.items()}
        y: Tensor | None = None
        for length, begun, pieces in self._groups(live, count, pad):
            sequences = torch.stack([_padded(x[b, at], length) for b, _, at in pieces])
            bs, rs = [b for b, _, _ in pieces], [r for _, r, _ in pieces]
            out, after = self._call(sequences, {k: t[bs, rs] for k, t in leaves.items()} if begun else None, {})
            y = x.new_zeros(*x.shape[:2], out.shape[-1], dtype=out.dtype) if y is None else y
            for (b, _, at), each in zip(pieces, out, strict=True):
                y = y.index_put((torch.full_like(at, b), at), each[: len(at)])
            for name, t in (after or {}).items():
                held = leaves.get(name)
                held = t.new_zeros(len(x), self.rows, *t.shape[1:]) if held is None else held
                leaves[name] = held.index_put((torch.tensor(bs, device=t.device), torch.tensor(rs, device=t.device)), t)
        if y is None:  # nothing counts; one token says how wide the output is
            y = torch.zeros_like(self._call(x[:, :1], None, {})[0]).expand(-1, x.shape[1], -1)
        return y, SequenceState(leaves, count + live.sum(dim=-1)) if leaves else None

    def _groups(
        self, live: Tensor, count: Tensor, pad: bool
    ) -> Iterator[tuple[int, bool, list[tuple[int, int, Tensor]]]]:
        """Sequences of one length that have begun or not: (length, begun, [(batch index, row, places)])."""
        groups: dict[tuple[int, bool], list[tuple[int, int, Tensor]]] = {}
        for b, seen in enumerate(count.tolist()):
            places = live[b].nonzero().flatten()
            for row in range(self.rows):
                at = places[(row - seen) % self.rows :: self.rows]
                length = -(-len(places) // self.rows) if pad else len(at)
                if length:
                    groups.setdefault((length, seen > row), []).append((b, row, at))
        for (length, begun), pieces in groups.items():
            yield length, begun, pieces

    def _call(
        self, x: Tensor, leaves: Mapping[str, Tensor] | None, masks: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The module's output as `(b, n, h * e)`, and the tensors of its state, rows first."""
        given = () if leaves is None else (_nested({k: t.movedim(0, self.batch_axis) for k, t in leaves.items()}),)
        result = self.module(x, *given, **masks)
        results = result if isinstance(result, tuple) else (result,)
        out, state = results[0], results[1] if len(results) > 1 else None
        out = out.transpose(1, 2).flatten(2) if out.ndim == 4 else out
        flat = {name: t.movedim(self.batch_axis, 0) for name, t in _flat(state)}
        return out, flat or None

    def _deal(self, t: Tensor) -> Tensor:
        fill = t.new_zeros(t.shape[0], -t.shape[1] % self.rows, *t.shape[2:])
        return torch.cat((t, fill), dim=1).unflatten(1, (-1, self.rows)).transpose(1, 2).flatten(0, 1)


def _padded(t: Tensor, length: int) -> Tensor:
    return torch.cat((t, t.new_zeros(length - len(t), *t.shape[1:])))


def _flat(state: Any, name: str = "hybrid") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, by where they stand in its tuples."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, (tuple, list)):
        for index, part in enumerate(state):
            yield from _flat(part, f"{name}/{index}")


def _nested(leaves: Mapping[str, Tensor], name: str = "hybrid") -> Any:
    """The way back to tensors and tuples of them."""
    if name in leaves:
        return leaves[name]
    count = len({key[len(name) + 1 :].split("/")[0] for key in leaves if key.startswith(f"{name}/")})
    return tuple(_nested(leaves, f"{name}/{index}") for index in range(count))
