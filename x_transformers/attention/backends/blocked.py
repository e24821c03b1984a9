"""Attention by blocks of queries, written in tensor operations: what a CPU runs where PyTorch has no kernel for it.

For a block of queries it computes the scores against the stretch of keys that may be visible to them, modifies and
weighs them while they are at hand, and forgets them; the backward pass computes them anew (2205.14135). Memory is
linear in length, and most of what causality or a window hides is never computed. Weights are kept for the backward
pass only where a query has few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation
from x_transformers.attention.base import BoundScore, Needs, Tiles
from x_transformers.masks.visibility import MaskSpec
from x_transformers.ops import at_least_float32

TALLEST, SHORTEST = 128, 16
AREA = 2**20
"""Queries of a block, and scores of one of all heads and rows: beyond so many they leave a processor's caches."""

LEAST = {torch.float32: 1e-22, torch.float64: 1e-200}
"""A weight below this is 0: it is lost in the sum, and what comes of it may be denormal, which a CPU computes with many
times slower."""

KEPT = 1280
"""Numbers that a query of a head may leave for the backward pass, on the average; more of them are computed anew."""

NEVER = float("-inf")


class Blocked(Backend):
    """Softmax attention by blocks of queries: `out = softmax(scores) v`, one block after the other.

    A learned sink is applied behind, by the log-sum-exp of the scores: `out * sigmoid(lse - sink)`.
    """

    name = "blocked"
    fused = True
    provides = Needs.MASK | Needs.BIAS | Needs.POINTWISE | Needs.SINK | Needs.DOCUMENTS

    def refuses(self, situation: Situation, needs: Needs) -> str | None:
        if situation.device != "cpu":
            return f"blocked is made for a CPU, not for {situation.device}"
        if situation.compiling:
            return "blocked does not run inside of a compiled graph"
        return None

    def attend(self, request: Request) -> AttentionOutput:
        plan, inputs = plan_of(request)
        out, lse = Weigh.apply(plan, request.q, request.k, request.v, *inputs)
        if request.sink is not None:
            out = out * torch.sigmoid(lse - request.sink.to(lse.dtype)[None, :, None, None]).to(out.dtype)
        return AttentionOutput(out)


class ScoreStep(NamedTuple):
    """One modification of the scores: a bias, and where its inputs stand among all; or a function of single scores."""

    by: Tiles | BoundScore
    inputs: slice = slice(0)


class Block(NamedTuple):
    """A stretch of queries, and the stretch of keys, the prefix left out, that it looks at."""

    rows: slice
    columns: slice

    @property
    def area(self) -> int:
        """Pairs of a query and a key."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class BlockOutput(NamedTuple):
    """What the way back through a block needs.

    Attributes:
        weights: `(b * g, h // g * rows, P + columns)`.
        left: what each pointwise function leaves for its `chain`, `(b, h, rows, P + columns)`.
    """

    weights: Tensor
    left: list[Tensor]


class Memory:
    """Room for what every block writes anew: to ask the system for memory costs as much as to compute.

    Args:
        like: its device and dtype are taken.
        size: numbers of the largest block.
        keep: what is taken stays, and is not written again.
    """

    def __init__(self, like: Tensor, size: int, keep: bool = False) -> None:
        self.like, self.size, self.keep = like, size, keep
        self.rooms: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of such a shape, with anything in it."""
        if self.keep:
            return self.like.new_empty(shape)
        if name not in self.rooms:
            self.rooms[name] = self.like.new_empty(self.size)
        return self.rooms[name][: math.prod(shape)].view(shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """What both passes must do alike.

    Attributes:
        scale: factor of `q k^T`. height: queries of a block. prefix: keys in front that no bias is about.
        hiding: what hides keys, beside those that `shadow` hides: `(b, 1, 1, j)`, 0 or minus infinity, or None.
        steps: modifications of the scores, in pipeline order.
        empty: rows may see nothing. sums: somebody asks for the log-sum-exp.
        steep: biases may bring scores so far below the largest that their weights are denormal.
        keep: the backward pass finds the weights of the forward pass.
    """

    scale: float
    height: int
    prefix: int
    hiding: MaskSpec | None
    shadow: Tensor | None
    steps: tuple[ScoreStep, ...]
    empty: bool
    sums: bool
    steep: bool
    keep: bool = False

    @property
    def numbers(self) -> int:
        """Numbers for a pair of a query and a key that the way back needs."""
        return 1 + sum(isinstance(step.by, BoundScore) for step in self.steps)

    def blocks(self, queries: int, keys: int) -> Iterator[Block]:
        """The blocks that cover all queries."""
        for start in range(0, queries, self.height):
            stop = min(start + self.height, queries)
            first, last = (0, keys) if self.hiding is None else self.hiding.reach(start, stop)
            yield Block(slice(start, stop), slice(first, last))

    def through(
        self,
        rows: Tensor,
        keys: Tensor,
        heads: Sequence[int],
        block: Block,
        inputs: Sequence[Tensor],
        memory: Memory,
        lse: Tensor | None = None,
    ) -> BlockOutput:
        """The weights of a block.

        Args:
            rows: `(b * g, h // g * rows, d)` queries. heads: b, h.
            keys: `(b * g, P + columns, d)`, what `stretch` takes.
            lse: see `weigh`.
        """
        shape = (*rows.shape[:2], keys.shape[1])
        product = memory.take("product", shape)
        torch.baddbmm(product, rows, keys.mT, beta=0, alpha=self.scale, out=product)
        scores, left = self.modify(by_heads(product, heads), block, inputs, memory)
        weights = memory.take("weights", shape)
        self.weigh(scores, by_heads(weights, heads), lse)
        return BlockOutput(weights, left)

    def modify(
        self, scores: Tensor, block: Block, inputs: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor]]:
        """Scaled products `(b, h, rows, P + columns)`, which are used up, to modified and masked scores.

        Returns:
            them, and what the pointwise functions left for the way back.
        """
        left: list[Tensor] = []
        for step in self.steps:
            if isinstance(step.by, Tiles):
                scores[..., self.prefix :] += step.by.tile(inputs[step.inputs], block.rows, block.columns)
                continue
            assert step.by.pointwise_ is not None
            left.append(scores)
            scores = step.by.pointwise_(scores, memory.take(f"pointwise {len(left)}", scores.shape))
        if self.hiding is not None:
            hide(scores, self.hiding, block)
        if self.shadow is not None:
            scores[..., self.prefix :] += self.shadow[..., block.columns]
        return scores, left

    def weigh(self, scores: Tensor, out: Tensor, lse: Tensor | None = None) -> Tensor:
        """Softmax of the scores, which are used up; zeros in rows that see nothing.

        Args:
            out: where it is put.
            lse: `(b, h, rows, 1)` takes up the log-sum-exp, if anybody asks for it; infinite in such rows.
        """
        most = scores.amax(dim=-1, keepdim=True) if self.empty or lse is not None else None
        weights = torch.softmax(scores, dim=-1, out=out)
        if self.steep:
            torch.threshold_(weights, LEAST[weights.dtype], 0.0)
        if most is None:
            return weights
        empty = most == NEVER
        if empty.any():
            weights.masked_fill_(empty, 0.0)
        if lse is not None:
            # the largest weight is one part of the sum
            lse.copy_((most - weights.amax(dim=-1, keepdim=True).log()).masked_fill_(empty, float("inf")))
        return weights

    def back(
        self,
        gradient: Tensor,
        block: Block,
        inputs: Sequence[Tensor],
        left: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> Tensor:
        """From the gradient of the modified scores to that of the products, in place.

        Args:
            left: by the pointwise functions.
            sums: for each input the sum of its gradients, to be added to; None for one that wants none.
        """
        left = list(left)
        for step in reversed(self.steps):
            if isinstance(step.by, Tiles):
                add_gradients(step.by, gradient[..., self.prefix :], block, inputs[step.inputs], sums[step.inputs])
            else:
                assert step.by.chain is not None
                gradient = step.by.chain(gradient, left.pop())
        return gradient


def plan_of(request: Request) -> tuple[Plan, list[Tensor]]:
    """What is to be done, and the inputs of all biases."""
    b, h, i, _ = request.q.shape
    visible, steps, inputs = request.visible, [], []
    height = block_height(b * h, i, request.k.shape[-2])
    for score in request.scores:
        if score.needs is not Needs.BIAS:
            steps.append(ScoreStep(score))
            continue
        tiles = score.tiles(height)
        steps.append(ScoreStep(tiles, slice(len(inputs), len(inputs) + len(tiles.inputs))))
        inputs += tiles.inputs
    hiding, shadow = visible.hiding, None
    if hiding is not None and hiding.live is not None:
        # to add is faster than to fill
        shadow = at_least_float32(request.q.new_zeros(hiding.live.shape)).masked_fill_(~hiding.live, NEVER)
        hiding, shadow = replace(hiding, live=None), shadow[:, None, None, :]
        hiding = hiding if hiding.anything else None
    plan = Plan(
        scale=request.scale,
        height=height,
        prefix=visible.prefix,
        hiding=hiding,
        shadow=shadow,
        steps=tuple(steps),
        empty=visible.may_be_dead,
        sums=request.sink is not None,
        steep=any(isinstance(step.by, Tiles) for step in steps),
    )
    area = sum(block.area for block in plan.blocks(i, request.k.shape[-2] - visible.prefix))
    return replace(plan, keep=plan.numbers * area <= KEPT * i), inputs


def block_height(heads: int, queries: int, keys: int) -> int:
    """Queries of a block, for so many heads of all rows together."""
    height = TALLEST
    while height > SHORTEST and heads * height * keys > AREA:
        height //= 2
    return min(height, queries)


def hide(scores: Tensor, hiding: MaskSpec, block: Block) -> None:
    """Fill what a block must not see with minus infinity, in place."""
    if hiding.shown is not None:
        scores[..., : hiding.prefix].masked_fill_(~hiding.shown[:, None, None, :], NEVER)
    first, last = block.columns.start, block.columns.stop
    begin, end = hiding.clear(block.rows.start, block.rows.stop)
    for start, stop in ((first, begin), (end, last)):
        if start < stop:
            hidden = ~hiding.seen(block.rows, slice(start, stop))
            own = scores[..., hiding.prefix :]
            own[..., start - first : stop - first].masked_fill_(hidden, NEVER)


def add_gradients(
    tiles: Tiles, gradient: Tensor, block: Block, inputs: Sequence[Tensor], sums: Sequence[Tensor | None]
) -> None:
    """Add to the sums what a tile's gradient means for its inputs."""
    wanted = [(t, total) for t, total in zip(inputs, sums, strict=True) if total is not None]
    if not wanted:
        return
    if tiles.view:
        part = tiles.tile([total for _, total in wanted], block.rows, block.columns)
        part += gradient.sum_to_size(part.shape)
        return
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(total is not None) for t, total in zip(inputs, sums, strict=True)]
        tile = tiles.tile(leaves, block.rows, block.columns)
    found = torch.autograd.grad(tile, [t for t in leaves if t.requires_grad], gradient.sum_to_size(tile.shape))
    for (_, total), part in zip(wanted, found, strict=True):
        total += part


class Weigh(torch.autograd.Function):
    """`(plan, q, k, v, *inputs of biases) -> (out, lse)`. Queries of heads that share keys are rows of one product."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        keep, kept = plan.keep and any(ctx.needs_input_grad), list[BlockOutput]()
        with torch.autocast("cpu", enabled=False):
            heads, (queries, keys, values) = q.shape[:2], (folded(q, k.shape[1]), flat(k), flat(v))
            out = queries.new_empty(*q.shape[:3], v.shape[-1])
            lse = queries.new_empty(*q.shape[:3] if plan.sums else (0,), 1)
            memory = Memory(queries, math.prod(q.shape[:2]) * plan.height * k.shape[-2], keep)
            for block in plan.blocks(q.shape[-2], k.shape[-2] - plan.prefix):
                rows = queries[:, :, block.rows].flatten(1, 2)
                some, some_values = (stretch(t, plan.prefix, block.columns) for t in (keys, values))
                sums = lse[:, :, block.rows] if plan.sums else None
                passed = plan.through(rows, some, heads, block, inputs, memory, sums)
                out[:, :, block.rows] = by_heads(passed.weights @ some_values, heads)
                if keep:
                    kept.append(passed)
        out = out.to(q.dtype)
        ctx.plan, ctx.inputs = plan, len(inputs)
        ctx.save_for_backward(q, k, v, out, *inputs, *(t for passed in kept for t in (passed.weights, *passed.left)))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        q, k, v, out, *inputs = ctx.saved_tensors
        inputs, kept = inputs[: ctx.inputs], inputs[ctx.inputs :]
        passes = kept_passes(plan, kept)
        d_out, d_lse = gradients
        d_out = torch.zeros_like(out) if d_out is None else d_out
        with torch.autocast("cpu", enabled=False):
            # a score's gradient is its weight times what the weight's own exceeds the mean of the row by
            mean = (at_least_float32(d_out) * out).sum(dim=-1, keepdim=True)
            mean = mean if d_lse is None else mean - d_lse
            queries, d_heads = folded(q, k.shape[1]), folded(d_out, k.shape[1])
            keys, values, heads = flat(k), flat(v), q.shape[:2]
            d_queries, d_keys, d_values = (torch.zeros_like(t) for t in (queries, keys, values))
            sums = [
                torch.zeros_like(t, dtype=queries.dtype) if wanted else None
                for t, wanted in zip(inputs, ctx.needs_input_grad[4:], strict=True)
            ]
            memory = Memory(queries, math.prod(q.shape[:2]) * plan.height * k.shape[-2])
            for block in plan.blocks(q.shape[-2], k.shape[-2] - plan.prefix):
                rows, d_rows = (t[:, :, block.rows].flatten(1, 2) for t in (queries, d_heads))
                some, some_values = (stretch(t, plan.prefix, block.columns) for t in (keys, values))
                weights, left = next(passes, None) or plan.through(rows, some, heads, block, inputs, memory)
                add_product(d_values, weights.mT, d_rows, plan.prefix, block.columns)
                gradient = torch.bmm(d_rows, some_values.mT, out=memory.take("gradient", weights.shape))
                gradient = by_heads(gradient, heads).sub_(mean[:, :, block.rows])
                gradient = plan.back(gradient.mul_(by_heads(weights, heads)), block, inputs, left, sums)
                gradient = gradient.view_as(weights)
                add_product(d_keys, gradient.mT, rows, plan.prefix, block.columns)
                d_queries[:, :, block.rows] = (gradient @ some).unflatten(1, (queries.shape[1], -1))
        d_queries *= plan.scale
        d_keys *= plan.scale
        return (
            None,
            d_queries.view(q.shape).to(q.dtype),
            d_keys.view(k.shape).to(k.dtype),
            d_values.view(v.shape).to(v.dtype),
            *(None if total is None else total.to(t.dtype) for total, t in zip(sums, inputs, strict=True)),
        )


def kept_passes(plan: Plan, kept: Sequence[Tensor]) -> Iterator[BlockOutput]:
    """The passes of all blocks, from their tensors in a row."""
    for start in range(0, len(kept), plan.numbers):
        yield BlockOutput(kept[start], list(kept[start + 1 : start + plan.numbers]))


def folded(q: Tensor, groups: int) -> Tensor:
    """`(b, h, i, d) -> (b * g, h // g, i, d)`, in float32 or wider."""
    b, h, i, d = q.shape
    return at_least_float32(q).reshape(b * groups, h // groups, i, d)


def by_heads(t: Tensor, heads: Sequence[int]) -> Tensor:
    """`(b * g, h // g * rows, ...) -> (b, h, rows, ...)`, for `heads` of b, h."""
    return t.view(*heads, -1, t.shape[-1])


def flat(t: Tensor) -> Tensor:
    """`(b, g, j, d) -> (b * g, j, d)`, in float32 or wider."""
    return at_least_float32(t).reshape(-1, *t.shape[2:])


def stretch(t: Tensor, prefix: int, columns: slice) -> Tensor:
    """`(b * g, P + columns, d)`, the keys of the prefix and those of a stretch."""
    if prefix == 0 or columns.start == 0:
        return t[:, columns.start : prefix + columns.stop]
    return torch.cat((t[:, :prefix], t[:, prefix + columns.start : prefix + columns.stop]), dim=1)


def add_product(total: Tensor, one: Tensor, two: Tensor, prefix: int, columns: slice) -> None:
    """Add a product to what `stretch` takes."""
    if prefix == 0 or columns.start == 0:
        total[:, columns.start : prefix + columns.stop].baddbmm_(one, two)
        return
    total[:, :prefix].baddbmm_(one[:, :prefix], two)
    total[:, prefix + columns.start : prefix + columns.stop].baddbmm_(one[:, prefix:], two)
