"""Models that run their stack several times: recycling, as AlphaFold 2 does, and loops (2510.25741)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.cache.looped import LoopedCache, chosen, extended, newest_of
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.losses import reaching
from x_transformers.models.inputs import TokenSpan
from x_transformers.models.internal_sequence import tokens_of
from x_transformers.models.memory_layout import MemoryLayout

Around = Callable[[AttentionLayers, TokenSpan], Callable[..., Any]]
"""The stack, and the tokens of a pass, to what a model calls instead of the stack."""

OF_THE_RECORD = frozenset(
    {
        "return_gumbel_log_probs",
        "cache",
        "input_not_include_cache",
        "return_hiddens",
        "return_aux_loss",
        "capture",
        "header",
    }
)
"""Arguments that only the pass whose record is kept gets."""


def recycling(project: nn.Module | None, steps: int | None, most: int, training: bool) -> Around:
    """Return a stack that reads a map of its own output, `x + project(F(x + project(F(...))))`.

    The passes before the last one have no gradient.

    Args:
        project: map from `(b, n, D)` to the same shape, or None in a model without.
        steps: number of passes, including the last one.
        most: the number in evaluation, and the largest one in training, if `steps` is None.
        training: draw the number.

    Raises:
        InputError: if the model does not recycle, or the number is less than 1.
    """
    if project is None:
        raise InputError("`recycle_steps` is for a recycling model; build it with `recycling = True`.")
    if steps is None:
        steps = int(torch.randint(1, most + 1, ())) if training else most
    if steps < 1:
        raise InputError(f"`recycle_steps` is {steps}; the stack must run at least once.")

    def around(stack: AttentionLayers, span: TokenSpan) -> Callable[..., Any]:
        def run(x: Tensor, **arguments: Any) -> Any:
            given = {name: value for name, value in arguments.items() if name not in OF_THE_RECORD}
            again = x if steps > 1 else reaching(x, project)  # the number of passes is random in training
            for _ in range(steps - 1):
                with torch.no_grad():
                    out = stack(again, **given)
                # outside of `no_grad`, so that the map learns; the gradient ends at the output of the stack
                again = x + project(out)
            return stack(again, **arguments)

        return run

    return around


def looping(gate: nn.Module | None, steps: int | None, most: int | None, default: int, threshold: float) -> Around:
    """Return a stack that runs on its own output: `X[i + 1] = F(X[i])`.

    Args:
        gate: `(b, n, D)` to logits `(b, n, 1)` of stopping, or None in a model without loops.
        steps: number of loops of every token; default the most.
        most: largest number of loops of a token.
        default: the same, of the constructor.
        threshold: a generated token leaves as soon as its probability of having stopped reaches this.

    Raises:
        InputError: if the model has no loops, or a number is less than 1.
    """
    if gate is None:
        raise InputError(
            "`looped_steps`, `max_looped_steps` and `looped_inference` are for looped models; build with "
            "`looped = True`, or drop them."
        )
    count = steps if steps is not None else most if most is not None else default
    if count < 1 or not 0 <= threshold <= 1:
        raise InputError(
            f"the stack is to run {count} times, with a threshold of {threshold}; it must run at least once, and "
            "`looped_exit_prob_threshold` is a probability."
        )
    leaves = threshold if steps is None else None
    return lambda stack, span: _Loops(stack, span, gate, count, leaves)


class _Loops:
    """Runs a stack on its own output; the record shows each loop.

    A prompt, or a pass without a cache, runs all loops. A token after it leaves the loops early: as soon as

        sum over j <= i of sigmoid(g_j) prod over k < j of sigmoid(-g_k) >= threshold

    Its keys and values are then those of the loop that it left, in the cache of every loop.

    Args:
        stack: F.
        span: tokens of the pass.
        gate: features to g.
        count: number of loops.
        threshold: None if no token leaves early.
    """

    def __init__(
        self, stack: AttentionLayers, span: TokenSpan, gate: nn.Module, count: int, threshold: float | None
    ) -> None:
        self.stack, self.span, self.gate, self.count, self.threshold = stack, span, gate, count, threshold

    def __call__(
        self, x: Tensor, *, cache: KVCache | None = None, return_hiddens: bool = False, **arguments: Any
    ) -> Any:
        if not return_hiddens:
            return self._features(x, arguments)
        if cache is not None and cache.capacity is not None:
            raise InputError(
                "a looped model decides at each token how often its stack runs, which fixed buffers cannot follow; use "
                "the dynamic cache."
            )
        if cache is None or (not cache.started and self.span.count != 1):
            return self._all(x, cache, arguments)
        if self.span.count > 1:
            raise InputError(
                "a looped model reads its own tokens one at a time, since each may leave the loops at another one; "
                "pass one token, and no `draft_model` or `prompt_lookup`."
            )
        return self._one(x, cache, arguments)

    def _features(self, x: Tensor, arguments: dict[str, Any]) -> Any:
        """Run all loops without recording them; if auxiliary losses are requested, return their record too."""
        records = []
        for _ in range(self.count):
            out = self.stack(x, **arguments)
            if arguments.get("return_aux_loss"):
                x, record = out
                records.append(record)
            else:
                x = out
        if not records:
            return x
        records[-1].include_routing(records[:-1])
        return x, records[-1]

    def _all(self, x: Tensor, cache: KVCache | None, arguments: dict[str, Any]) -> tuple[Tensor, LayerIntermediates]:
        """Run all loops, which have a cache each."""
        features, records = [], []
        capture = arguments["capture"]
        of_earlier = Capture(losses=capture.losses, routing=capture.routing)
        for loop in range(self.count):
            given = arguments if loop == self.count - 1 else {**arguments, "capture": of_earlier}
            own = None if cache is None else KVCache()
            x, record = self.stack(x, cache=own, return_hiddens=True, **given)
            features.append(x)
            records.append(record)
        record = records[-1]
        record.include_routing(records[:-1])
        record.exit_indices = torch.full((1, 1), self.count - 1, device=x.device)
        caches = [each.cache for each in records if each.cache is not None]
        if len(caches) == self.count:
            record.looped_prompt_kv_cache = [[kv.cached_kv for kv in each.attn_intermediates or ()] for each in records]
            record.cache = LoopedCache.of(caches)
            record.cache.exit_indices = record.exit_indices
        record.loop_features = features
        return x, record

    def _one(self, x: Tensor, cache: KVCache, arguments: dict[str, Any]) -> tuple[Tensor, LayerIntermediates]:
        """Run loops until the token of every row has left them."""
        loops = cache.loops if isinstance(cache, LoopedCache) else (cache.begin(0),) * self.count
        if len(loops) != self.count:
            raise InputError(
                f"the cache is of {len(loops)} loops, and {self.count} are to run; keep `looped_steps` and "
                "`max_looped_steps` as they were for the prompt."
            )
        rows, columns = x.shape[0], x.shape[1]
        index = torch.full((rows,), self.count - 1, device=x.device)
        going, stays, left = torch.ones_like(index, dtype=torch.bool), 0.0, 0.0
        features, gates, added = [], [], []
        records: list[LayerIntermediates] = []
        for loop, own in enumerate(loops):
            x, record = self.stack(x, cache=own, return_hiddens=True, **arguments)
            records.append(record)
            features.append(x)
            added.append(newest_of(record.cache, columns))
            if loop == self.count - 1 or self.threshold is None:
                continue
            gates.append(self.gate(x[:, -1:]))
            logit = gates[-1].float()[:, 0, 0]
            left = left + (stays + F.logsigmoid(logit)).exp()
            stays = stays + F.logsigmoid(-logit)
            leaves = going & (left >= self.threshold)
            index, going = index.masked_fill(leaves, loop), going & ~leaves
            if not bool(going.any()):
                break
        x = torch.stack(features)[index, torch.arange(rows, device=x.device)]
        record = records[-1]
        record.include_routing(records[:-1])
        newest, last = chosen(added, index), record.cache
        assert last is not None
        record.cache = LoopedCache.of([extended(own, last, newest) for own in loops])
        before = cache.exit_indices if isinstance(cache, LoopedCache) else None
        now = index.unsqueeze(-1)
        record.exit_indices = now if before is None else torch.cat((before.expand(rows, -1), now), dim=-1)
        record.cache.exit_indices, record.exit_logits, record.loop_features = record.exit_indices, gates, None
        return x, record


def add_loops(
    record: LayerIntermediates,
    gate: nn.Module,
    logits_of: Callable[[Tensor], Any] | None,
    layout: MemoryLayout,
    span: TokenSpan,
) -> None:
    """Fill in the gates, and the logits, of each loop of a pass: of tokens only.

    Args:
        record: of the pass.
        gate: features to logits of stopping.
        logits_of: features to logits, or None if they are not requested.
        layout: memory tokens of the model.
        span: tokens of the pass.
    """
    if record.loop_features is None:
        return
    record.loop_features = [tokens_of(t, layout, span.count, span.leading) for t in record.loop_features]
    record.exit_logits = [gate(t) for t in record.loop_features]
    if logits_of is not None:
        record.all_pred_logits = [logits_of(t) for t in record.loop_features]


def looped_loss(
    losses: Tensor, gates: Tensor, counts: Tensor, *, threshold: float, slope: float, weight: float
) -> Tensor:
    """Return the expected loss of the loop that a token leaves, plus that of the gates.

    With `p_i = sigmoid(g_i) prod over j < i of sigmoid(-g_j)`, and the rest for the last loop, as constants:

        mean over tokens and loops of p_i l_i + weight * mean of BCE(g_i, y_i)
        y_i = sigmoid(slope * (l_{i + 1} - l_i + threshold))

    Args:
        losses: `(S, b, n)` losses l of each loop.
        gates: `(S, b, n)` logits g of stopping.
        counts: `(b, n)` bool, the tokens that count.
        threshold, slope, weight: of the gates; a further loop should improve the loss by more than the threshold.

    Returns:
        A scalar; 0, attached to the graph, if no token counts.
    """
    loops = losses.shape[0]
    with torch.no_grad():
        stays = F.logsigmoid(-gates).cumsum(dim=0) - F.logsigmoid(-gates)
        leaves = (stays + F.logsigmoid(gates)).exp()
        leaves[-1] = stays[-1].exp()
        wanted = (slope * (losses[1:] - losses[:-1] + threshold)).sigmoid()
    total = (leaves * losses).masked_fill(~counts, 0.0).sum()
    of_gates = F.binary_cross_entropy_with_logits(gates[:-1], wanted, reduction="none").masked_fill(~counts, 0.0).sum()
    tokens = counts.sum().clamp(min=1)
    return total / (tokens * loops) + weight * of_gates / (tokens * max(loops - 1, 1))
