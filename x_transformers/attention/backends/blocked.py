"""Attention by blocks of queries, written in tensor operations, for CPUs where PyTorch has no kernel (2205.14135).

For a block of queries it computes the scores against the range of keys that may be visible to them, modifies them,
takes the softmax and the weighted sum of the values while all of that is in the processor's cache, and drops it; the
backward pass computes it again. Memory is linear in the length, and most pairs that causality or a window hides are
never computed. Weights are kept for the backward pass only where a query has few of them.

Unlike in kernels for a GPU, a block holds whole rows of scores: a processor has room for them, and the softmax of a
whole row needs no running maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation, ignores_constants
from x_transformers.attention.base import BoundScore, Needs, Tiles
from x_transformers.attention.qk.decay import Decay
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.masks.visibility import MaskSpec
from x_transformers.ops import at_least_float32

TALLEST, SHORTEST = 128, 16
AREA = 2**20
"""Bounds of the queries of a block, and of its scores for all heads and rows: more do not fit a processor's cache."""

LEAST = {torch.float32: 1e-22, torch.float64: 1e-200}
"""Weights below this become 0. They are lost in the sum anyway, and products with them may be denormal numbers, with
which a CPU computes many times slower."""

KEPT = 1280
"""Numbers per query and head that are kept for the backward pass, on average; if there are more, they are computed
again instead."""

NEVER = float("-inf")


class Blocked(Backend):
    """Softmax attention by blocks of queries: `out = softmax(scores) v`, one block after the other.

    A learned sink is applied afterwards, by the log-sum-exp of the scores: `out * sigmoid(lse - sink)`.
    """

    name = "blocked"
    fused = True
    provides = Needs.MASK | Needs.BIAS | Needs.POINTWISE | Needs.SINK | Needs.DOCUMENTS | Needs.DECAY

    def refuses(self, situation: Situation, needs: int) -> str | None:
        if situation.device != "cpu":
            return f"blocked is made for a CPU, not for {situation.device}"
        if situation.compiling:
            return "blocked does not run inside of a compiled graph"
        return None

    def attend(self, request: Request) -> AttentionOutput:
        plan, inputs = plan_of(request)
        if request.decay is None:
            out, lse = BlockwiseSoftmax.apply(plan, request.q, request.k, request.v, *inputs)
        else:
            out, lse = _decaying(request.decay, plan, request, inputs)
        # A sink joins only the denominator: every weight is multiplied by exp(lse) / (exp(lse) + exp(sink)), which is
        # this sigmoid. In rows that see no key lse is infinite, so that the factor is 1 and its gradient is 0, never
        # NaN.
        if request.sink is not None:
            out = out * torch.sigmoid(lse - request.sink.to(lse.dtype)[None, :, None, None]).to(out.dtype)
        return AttentionOutput(out)


def _decaying(decay: Decay, plan: Plan, request: Request, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, with queries and keys that are scaled for each range of queries."""
    outputs, sums = [], []
    for rows in decay.blocks(request.q.shape[-2]):
        q, k = decay.scaled(request.q, request.k, rows)
        out, lse = BlockwiseSoftmax.apply(replace(plan, first=rows.start), q, k, request.v, *inputs)
        outputs.append(out)
        sums.append(lse)
    return torch.cat(outputs, dim=-2), torch.cat(sums, dim=-2)


class ScoreStep(NamedTuple):
    """One modification of the scores: a bias, and the range of its inputs among all; or a function of single scores."""

    by: Tiles | BoundScore
    inputs: slice = slice(0)


class Block(NamedTuple):
    """A range of queries, and the range of keys (without the prefix) that they may see.

    Attributes:
        rows: the queries among all.
        places: the same among those that are computed with.
        columns: the keys.
    """

    rows: slice
    places: slice
    columns: slice

    @property
    def area(self) -> int:
        """Number of pairs of a query and a key."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


class BlockOutput(NamedTuple):
    """Results of one block that its backward pass needs.

    Attributes:
        weights: `(b * g, h // g * rows, P + columns)`.
        left: what each pointwise function leaves for its `chain`, `(b, h, rows, P + columns)`.
    """

    weights: Tensor
    left: list[Tensor]


class Scratch:
    """Scratch buffers reused by all blocks: to allocate memory from the system costs as much as to compute.

    Args:
        like: a tensor of the device and dtype of the buffers.
        size: numbers of the largest block.
        keep: every block gets tensors of its own, which are kept.
    """

    def __init__(self, like: Tensor, size: int, keep: bool = False) -> None:
        self.like, self.size, self.keep = like, size, keep
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return an uninitialized tensor of this shape."""
        # kept tensors are saved for the backward pass, so that no later block may overwrite them
        if self.keep:
            return self.like.new_empty(shape)
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.size)
        # The buffer is flat, since blocks differ in shape: the last has fewer rows, and causality makes the first ones
        # narrower. A view of its first numbers is contiguous, which a slice of a larger matrix would not be.
        return self.buffers[name][: math.prod(shape)].view(shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """Settings of the forward pass that the backward pass must repeat.

    Attributes:
        scale: factor of `q k^T`.
        height: number of queries of a block.
        prefix: number of keys before the first token, which no bias covers.
        hiding: the rules that hide keys, except padding.
        shadow: `(b, 1, 1, j)` for padding: 0, or minus infinity for a hidden key; None without padding.
        steps: modifications of the scores, in pipeline order.
        empty: some queries may see no key.
        sums: the log-sum-exp is needed.
        steep: biases may move scores so far below the largest that their weights are denormal.
        keep: the weights of the forward pass are kept.
        first: number of the first query that is computed with; the rules and the biases are those of all queries.
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
    first: int = 0

    @property
    def numbers(self) -> int:
        """Numbers per pair of a query and a key that the backward pass needs."""
        return 1 + sum(isinstance(step.by, BoundScore) for step in self.steps)

    def blocks(self, queries: int, keys: int) -> Iterator[Block]:
        """Yield the blocks that cover all queries."""
        for start in range(0, queries, self.height):
            places = slice(start, min(start + self.height, queries))
            rows = slice(self.first + places.start, self.first + places.stop)
            first, last = (0, keys) if self.hiding is None else self.hiding.reach(rows.start, rows.stop)
            yield Block(rows, places, slice(first, last))

    def block_weights(
        self,
        rows: Tensor,
        keys: Tensor,
        heads: Sequence[int],
        block: Block,
        inputs: Sequence[Tensor],
        scratch: Scratch,
        lse: Tensor | None = None,
    ) -> BlockOutput:
        """Compute the weights of a block.

        Args:
            rows: `(b * g, h // g * rows, d)` queries.
            keys: `(b * g, P + columns, d)`, see `key_range`.
            heads: b and h.
            block: the queries and keys.
            inputs: those of all biases.
            scratch: for intermediate results.
            lse: see `softmax`.
        """
        shape = (*rows.shape[:2], keys.shape[1])
        product = scratch.take("product", shape)
        # With `beta=0` the first argument is ignored, even NaN in uninitialized memory; `alpha` makes the scaling part
        # of the matrix product instead of another pass over the block.
        torch.baddbmm(product, rows, keys.mT, beta=0, alpha=self.scale, out=product)
        scores, left = self.modify(by_heads(product, heads), block, inputs, scratch)
        weights = scratch.take("weights", shape)
        self.softmax(scores, by_heads(weights, heads), lse)
        return BlockOutput(weights, left)

    def modify(
        self, scores: Tensor, block: Block, inputs: Sequence[Tensor], scratch: Scratch
    ) -> tuple[Tensor, list[Tensor]]:
        """Modify and mask scaled products `(b, h, rows, P + columns)`, which are overwritten.

        Returns:
            the scores, and what the pointwise functions left for the backward pass.
        """
        left: list[Tensor] = []
        for step in self.steps:
            if isinstance(step.by, Tiles):
                own, columns = biased(step.by, scores, self.prefix, block)
                own += step.by.tile(inputs[step.inputs], block.rows, columns)
                continue
            assert step.by.pointwise_ is not None
            # The function leaves in its argument what its gradient needs, so that the result must go elsewhere: each
            # pointwise step has a buffer of its own, named by its number.
            left.append(scores)
            scores = step.by.pointwise_(scores, scratch.take(f"pointwise {len(left)}", scores.shape))
        if self.hiding is not None:
            hide(scores, self.hiding, block)
        # a key may be hidden twice: minus infinity plus minus infinity is minus infinity, not NaN
        if self.shadow is not None:
            scores[..., self.prefix :] += self.shadow[..., block.columns]
        return scores, left

    def softmax(self, scores: Tensor, out: Tensor, lse: Tensor | None = None) -> Tensor:
        """Compute the softmax of the scores, which may be overwritten; zeros in rows that see no key.

        Args:
            scores: `(b, h, rows, P + columns)`.
            out: where the weights are written.
            lse: `(b, h, rows, 1)` where the log-sum-exp is written if it is needed; infinite in such rows.
        """
        most = scores.amax(dim=-1, keepdim=True) if self.empty or lse is not None else None
        weights = torch.softmax(scores, dim=-1, out=out)
        # Weights need not be normalized again: the largest weight of a row is at least 1 / (number of keys), so that
        # what is dropped is far below its rounding error.
        if self.steep:
            torch.threshold_(weights, LEAST[weights.dtype], 0.0)
        if most is None:
            return weights
        # a row of minus infinity gives NaN; its queries attend to nothing, so that their weights are zeros
        empty = most == NEVER
        if empty.any():
            weights.masked_fill_(empty, 0.0)
        if lse is not None:
            # the largest weight is exp(most - lse), so that no second pass over the row is needed
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
        """Turn the gradient of the modified scores into that of the products, in place.

        Args:
            gradient: `(b, h, rows, P + columns)`.
            block: the queries and keys.
            inputs: those of all biases.
            left: by the pointwise functions.
            sums: for each input the sum of its gradients, to which is added; None for one that needs none.
        """
        # Masks have no step here: hidden keys have weight 0, by which their gradient has been multiplied already.
        # Biases do not change the gradient of the scores, they only collect it.
        left = list(left)
        for step in reversed(self.steps):
            if isinstance(step.by, Tiles):
                own, columns = biased(step.by, gradient, self.prefix, block)
                add_gradients(step.by, own, block.rows, columns, inputs[step.inputs], sums[step.inputs])
            else:
                assert step.by.chain is not None
                gradient = step.by.chain(gradient, left.pop())
        return gradient


def plan_of(request: Request) -> tuple[Plan, list[Tensor]]:
    """Return the settings of both passes, and the inputs of all biases."""
    b, h, i, _ = request.q.shape
    visible, steps, inputs = request.visible, [], []
    height, near = block_height(b * h, i, request.k.shape[-2]), ignores_constants(request)
    for score in request.scores:
        if score.needs != Needs.BIAS:
            steps.append(ScoreStep(score))
            continue
        tiles = score.tiles(height, request.memo, near=near)
        steps.append(ScoreStep(tiles, slice(len(inputs), len(inputs) + len(tiles.inputs))))
        inputs += tiles.inputs
    hiding, shadow = visible.hiding, None
    # Padding is the same for all queries of a row. Without it among the rules, `clear` can find ranges of keys that all
    # queries of a block see, where no mask of pairs is made at all.
    if hiding is not None and hiding.token_mask is not None:
        # an addition of minus infinity is faster than `masked_fill`
        shadow = at_least_float32(request.q.new_zeros(hiding.token_mask.shape)).masked_fill_(~hiding.token_mask, NEVER)
        hiding, shadow = hiding._replace(token_mask=None), shadow[:, None, None, :]
        hiding = hiding if hiding.anything else None
    plan = Plan(
        scale=request.scale,
        height=height,
        prefix=visible.prefix,
        hiding=hiding,
        shadow=shadow,
        steps=tuple(steps),
        empty=visible.fully_masked is not False,
        sums=request.sink is not None,
        steep=any(isinstance(step.by, Tiles) for step in steps),
    )
    area = sum(block.area for block in plan.blocks(i, request.k.shape[-2] - visible.prefix))
    return replace(plan, keep=plan.numbers * area <= KEPT * i), inputs


def block_height(heads: int, queries: int, keys: int) -> int:
    """Return the number of queries of a block, given the number of heads of all rows."""
    height = TALLEST
    while height > SHORTEST and heads * height * keys > AREA:
        height //= 2
    return min(height, queries)


def hide(scores: Tensor, hiding: MaskSpec, block: Block) -> None:
    """Fill the scores of hidden keys with minus infinity, in place.

    Most blocks consist of keys that all their queries see; only the ends of the range need a mask.
    """
    if hiding.shown is not None:
        scores[..., : hiding.prefix].masked_fill_(~hiding.shown[:, None, None, :], NEVER)
    # columns count keys from the first token on, and `scores` begins with the prefix and the block's first key
    first, last = block.columns.start, block.columns.stop
    begin, end = hiding.clear(block.rows.start, block.rows.stop)
    for start, stop in ((first, begin), (end, last)):
        if start < stop:
            hidden = ~hiding.seen(block.rows, slice(start, stop))
            own = scores[..., hiding.prefix :]
            own[..., start - first : stop - first].masked_fill_(hidden, NEVER)


def biased(tiles: Tiles, scores: Tensor, prefix: int, block: Block) -> tuple[Tensor, slice]:
    """Return the columns of `(..., P + columns)` that a bias may change, and which keys they are."""
    columns = tiles.columns(block.rows, block.columns)
    first = prefix - block.columns.start
    return scores[..., first + columns.start : first + columns.stop], columns


def add_gradients(
    tiles: Tiles,
    gradient: Tensor,
    rows: slice,
    columns: slice,
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor | None],
) -> None:
    """Add the gradients of the inputs of the tile of some queries and keys to their sums."""
    wanted = [(t, total) for t, total in zip(inputs, sums, strict=True) if total is not None]
    if not wanted:
        return
    # the tile of the sum is a view of it as well, so that an addition to the view adds to the sum; a tile that the
    # batch or the heads share takes the sum over them
    if tiles.view:
        part = tiles.tile([total for _, total in wanted], rows, columns)
        part += gradient.sum_to_size(part.shape)
        return
    # Autograd differentiates one tile at a time. The leaves are detached, so that this graph is freed with the block
    # and never reaches the graph of the pass.
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(total is not None) for t, total in zip(inputs, sums, strict=True)]
        tile = tiles.tile(leaves, rows, columns)
    found = torch.autograd.grad(tile, [t for t in leaves if t.requires_grad], gradient.sum_to_size(tile.shape))
    for (_, total), part in zip(wanted, found, strict=True):
        total += part


class BlockwiseSoftmax(torch.autograd.Function):
    """Softmax attention by blocks: `(plan, q, k, v, *inputs of biases) -> (out, lse)`.

    The queries of heads that share keys are rows of one matrix product. With weights `p`, output gradient `do` and
    `ds = p * (do v^T - sum(do * out))`, the gradients are `dq = ds k`, `dk = ds^T q` and `dv = p^T do`, each summed
    over the blocks; the gradient of the log-sum-exp is added to `ds` with the weights as its factors.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        keep, kept = plan.keep and any(ctx.needs_input_grad), list[BlockOutput]()
        # autocast would round the products to half precision, and `out=` does not accept tensors of another dtype
        with torch.autocast("cpu", enabled=False):
            heads, (queries, keys, values) = q.shape[:2], (folded(q, k.shape[1]), flat(k), flat(v))
            out = queries.new_empty(*q.shape[:3], v.shape[-1])
            # the function must return a tensor, so that a log-sum-exp that nobody reads is an empty one
            lse = queries.new_empty(*q.shape[:3] if plan.sums else (0,), 1)
            scratch = Scratch(queries, math.prod(q.shape[:2]) * plan.height * k.shape[-2], keep)
            for block in plan.blocks(q.shape[-2], k.shape[-2] - plan.prefix):
                rows = queries[:, :, block.places].flatten(1, 2)
                some, some_values = (key_range(t, plan.prefix, block.columns) for t in (keys, values))
                sums = lse[:, :, block.places] if plan.sums else None
                passed = plan.block_weights(rows, some, heads, block, inputs, scratch, sums)
                out[:, :, block.places] = by_heads(passed.weights @ some_values, heads)
                if keep:
                    kept.append(passed)
        out = out.to(q.dtype)
        # Tensors go through `save_for_backward` although `ctx` could hold them: an output that `ctx` holds is a
        # reference cycle, and changes of a saved tensor would go unnoticed.
        ctx.plan, ctx.inputs = plan, len(inputs)
        ctx.save_for_backward(q, k, v, out, *inputs, *(t for passed in kept for t in (passed.weights, *passed.left)))
        # without a sink the log-sum-exp has no gradient: None costs nothing, a tensor of zeros would be computed with
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        q, k, v, out, *inputs = ctx.saved_tensors
        inputs, kept = inputs[: ctx.inputs], inputs[ctx.inputs :]
        passes = kept_blocks(plan, kept)
        d_out, d_lse = gradients
        if torch.is_grad_enabled():
            # with `create_graph = True` the gradient is differentiated, which needs a graph of plain operations
            # aliases: one tensor may depend on another, which must not get the gradient of that path here
            tensors = [t.view_as(t) for t in (q, k, v, *inputs)]
            wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[1:], strict=True) if needed]
            outputs = [(y, dy) for y, dy in zip(plain(plan, *tensors), gradients, strict=True) if dy is not None]
            ys, dys = zip(*outputs, strict=True)
            found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
            return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
        d_out = torch.zeros_like(out) if d_out is None else d_out
        with torch.autocast("cpu", enabled=False):
            # `sum(do * out)` of each row, without the scores: the mean of the gradients of its weights
            mean = (at_least_float32(d_out) * out).sum(dim=-1, keepdim=True)
            mean = mean if d_lse is None else mean - d_lse
            queries, d_heads = folded(q, k.shape[1]), folded(d_out, k.shape[1])
            keys, values, heads = flat(k), flat(v), q.shape[:2]
            d_queries, d_keys, d_values = (torch.zeros_like(t) for t in (queries, keys, values))
            sums = [
                torch.zeros_like(t, dtype=queries.dtype) if wanted else None
                for t, wanted in zip(inputs, ctx.needs_input_grad[4:], strict=True)
            ]
            scratch = Scratch(queries, math.prod(q.shape[:2]) * plan.height * k.shape[-2])
            for block in plan.blocks(q.shape[-2], k.shape[-2] - plan.prefix):
                rows, d_rows = (t[:, :, block.places].flatten(1, 2) for t in (queries, d_heads))
                some, some_values = (key_range(t, plan.prefix, block.columns) for t in (keys, values))
                # either all blocks are kept or none is; a `BlockOutput` is a nonempty tuple and therefore true
                weights, left = next(passes, None) or plan.block_weights(rows, some, heads, block, inputs, scratch)
                add_product(d_values, weights.mT, d_rows, plan.prefix, block.columns)
                # the gradient of a softmax, `p * (do v^T - mean)`, without a second buffer: product, difference,
                # product
                gradient = torch.bmm(d_rows, some_values.mT, out=scratch.take("gradient", weights.shape))
                gradient = by_heads(gradient, heads).sub_(mean[:, :, block.places])
                gradient = plan.back(gradient.mul_(by_heads(weights, heads)), block, inputs, left, sums)
                gradient = gradient.view_as(weights)
                add_product(d_keys, gradient.mT, rows, plan.prefix, block.columns)
                # a query is in one block only, so that its gradient is assigned; those of keys and values are sums over
                # blocks
                d_queries[:, :, block.places] = (gradient @ some).unflatten(1, (queries.shape[1], -1))
        # `gradient` is that of the scaled products; to scale the results costs a factor per token, not one per pair
        d_queries *= plan.scale
        d_keys *= plan.scale
        return (
            None,
            d_queries.view(q.shape).to(q.dtype),
            d_keys.view(k.shape).to(k.dtype),
            d_values.view(v.shape).to(v.dtype),
            *(None if total is None else total.to(t.dtype) for total, t in zip(sums, inputs, strict=True)),
        )


def plain(plan: Plan, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `BlockwiseSoftmax` returns, by operations that can be differentiated any number of times."""
    heads, (queries, keys, values) = q.shape[:2], (folded(q, k.shape[1]), flat(k), flat(v))
    outputs, sums = [], []
    for block in plan.blocks(q.shape[-2], k.shape[-2] - plan.prefix):
        rows = queries[:, :, block.places].flatten(1, 2)
        some, some_values = (key_range(t, plan.prefix, block.columns) for t in (keys, values))
        scores = by_heads((rows @ some.mT) * plan.scale, heads)
        for step in plan.steps:
            if isinstance(step.by, Tiles):
                columns = step.by.columns(block.rows, block.columns)
                tile = step.by.tile(inputs[step.inputs], block.rows, columns)
                scores = scores + F.pad(tile, (scores.shape[-1] - tile.shape[-1], 0))
            else:
                assert step.by.pointwise is not None
                scores = step.by.pointwise(scores)
        hidden = torch.zeros_like(scores)
        if plan.hiding is not None:
            hide(hidden, plan.hiding, block)
        if plan.shadow is not None:
            hidden[..., plan.prefix :] += plan.shadow[..., block.columns]
        # gradients of rows of minus infinity are NaN; such rows are computed from zeros, and their weights dropped
        empty = hidden.amax(dim=-1, keepdim=True) == NEVER
        scores = scores + hidden.masked_fill(empty, 0.0)
        weights = scores.softmax(dim=-1).masked_fill(empty, 0.0)
        outputs.append(by_heads(weights.view(rows.shape[0], -1, weights.shape[-1]) @ some_values, heads))
        sums.append(scores.logsumexp(dim=-1, keepdim=True).masked_fill(empty, float("inf")))
    lse = torch.cat(sums, dim=-2) if plan.sums else queries.new_empty(0, 1)
    return torch.cat(outputs, dim=-2).to(q.dtype), lse


def kept_blocks(plan: Plan, kept: Sequence[Tensor]) -> Iterator[BlockOutput]:
    """Yield the results of all blocks from the list of their tensors."""
    for start in range(0, len(kept), plan.numbers):
        yield BlockOutput(kept[start], list(kept[start + 1 : start + plan.numbers]))


def folded(q: Tensor, groups: int) -> Tensor:
    """Reshape `(b, h, i, d)` to `(b * g, h // g, i, d)`, in float32 or wider."""
    # the h // g query heads that share a key head are adjacent: they become rows of one product, and no key is repeated
    b, h, i, d = q.shape
    return at_least_float32(q).reshape(b * groups, h // groups, i, d)


def by_heads(t: Tensor, heads: Sequence[int]) -> Tensor:
    """Reshape `(b * g, h // g * rows, ...)` to `(b, h, rows, ...)`, for `heads` of b, h."""
    return t.view(*heads, -1, t.shape[-1])


def flat(t: Tensor) -> Tensor:
    """Reshape `(b, g, j, d)` to `(b * g, j, d)`, in float32 or wider."""
    return at_least_float32(t).reshape(-1, *t.shape[2:])


def key_range(t: Tensor, prefix: int, columns: slice) -> Tensor:
    """Return `(b * g, P + columns, d)`, the keys of the prefix and those of a range."""
    # the prefix and a range that begins at the first token adjoin, so that one slice (a view) contains both
    if prefix == 0 or columns.start == 0:
        return t[:, columns.start : prefix + columns.stop]
    return torch.cat((t[:, :prefix], t[:, prefix + columns.start : prefix + columns.stop]), dim=1)


def add_product(total: Tensor, one: Tensor, two: Tensor, prefix: int, columns: slice) -> None:
    """Add a product to the rows that `key_range` returns."""
    # the keys of other blocks may have been a copy of two slices, whose gradients belong to two places
    if prefix == 0 or columns.start == 0:
        total[:, columns.start : prefix + columns.stop].baddbmm_(one, two)
        return
    total[:, :prefix].baddbmm_(one[:, :prefix], two)
    total[:, prefix + columns.start : prefix + columns.stop].baddbmm_(one[:, prefix:], two)
