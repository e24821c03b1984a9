"""Routed blocks of a pass: which tokens a block runs, and the stream after it (2404.02258)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Call, Memo, Span
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.layers.block_steps import may_rest, rest, run_blocks
from x_transformers.layers.depth_routing import DepthRouter, RoutedTokens, call_of
from x_transformers.layers.execution_order import Step
from x_transformers.layers.pass_state import PassInputs, PassState
from x_transformers.layers.stack import LayerStack


def route(
    stack: LayerStack,
    router: DepthRouter,
    block: Sequence[Step],
    inputs: PassInputs,
    state: PassState,
    *,
    rests: bool,
) -> PassState:
    """Run a block for the tokens that its router chooses, and return the state after it.

    Args:
        stack: of the block.
        router: of the block.
        block: its sublayers.
        inputs: of the pass.
        state: before the block.
        rests: the stream after the block is not needed.
    """
    call, before, kv = state.call, state.stream, state.kv
    ranks = router.ranks and (kv is None or kv.fresh)
    _check_routed(stack, block, inputs, call, ranks=ranks)
    scores, live = router(before), call.row_mask
    if call.query.placed is not None:
        live = call.query.placed if live is None else live & call.query.placed
    chosen, gates = router.choose(scores, live, ranks=ranks), scores.sigmoid()
    capture = call.capture
    if capture.losses or capture.routing:
        record = router.record(before, scores, chosen, call.token_mask, losses=capture.losses, choices=capture.routing)
        record.step = block[0].number
        state.recorder.routing.append(record)
    if ranks and may_gather(stack, inputs, state) and router.most(before.shape[1]) < before.shape[1]:
        return _run_gathered(stack, router, block, inputs, state, scores, chosen)
    state.call, state.routed = call_of(call, chosen), RoutedTokens(chosen, gates, router)
    # one token: only its own choice decides
    rests = rests or (chosen.numel() == 1 and may_rest(stack, inputs, state) and not bool(chosen))
    if rests:
        rest(stack, block, inputs, state)
    else:
        state = run_blocks(stack, block, inputs, state)
    state.call, state.routed = call, None
    state.stream = before if rests else mixed(before, state.stream, chosen, gates)
    return state


def mixed(before: Tensor, after: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Return the stream after a routed block, `(b, n, D)`.

    Args:
        before, after: `(b, n, D)` the stream before the block, and what the block makes of it.
        chosen: `(b, n)` bool, the tokens that ran.
        gates: `(b, n)` factors of what the block adds.
    """
    changed = before + gates.unsqueeze(-1).to(before.dtype) * (after - before)
    return torch.where(chosen.unsqueeze(-1), changed, before)


def may_gather(stack: LayerStack, inputs: PassInputs, state: PassState) -> bool:
    """Return True if a block may run the chosen tokens by themselves, without anything that is about all tokens.

    Args:
        stack: of the block.
        inputs: of the pass.
        state: of the pass.
    """
    call, capture = state.call, state.call.capture
    if state.kv is not None or capture.scores or capture.hiddens or capture.memories or inputs.documents is not None:
        return False
    given = (call.attn_mask, call.attn_bias, inputs.block_transform, inputs.kv_residuals, inputs.self_attn_inputs)
    given = (*given, inputs.rotary_pos_emb, inputs.polar_pos_emb, inputs.deep_embeds)
    for each in given:
        if each is not None:
            return False
    for each in (inputs.condition, inputs.injection):
        if each is not None and each.shape[1] > 1:
            return False
    # what attentions leave for later ones is about all tokens
    return not (inputs.additional or any(fn.leaves_values or fn.leaves_scores for fn in stack.attentions()))


def _run_gathered(
    stack: LayerStack,
    router: DepthRouter,
    block: Sequence[Step],
    inputs: PassInputs,
    state: PassState,
    scores: Tensor,
    chosen: Tensor,
) -> PassState:
    """Run a block on the chosen tokens only, and return the state after it.

    There are as many places as the longest row chooses; in shorter rows, other tokens fill them, which no one sees.
    """
    call, before = state.call, state.stream
    most = router.most(before.shape[1])
    # the chosen ones come first, and then in the order of arrival
    order = scores.masked_fill(~chosen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    index = order[:, :most].sort(dim=-1).values
    kept, query, columns = chosen.gather(1, index), call.query, index.unsqueeze(-1).expand(-1, -1, before.shape[-1])
    rows = before.shape[0]
    places = torch.arange(most, device=before.device)
    slot, pos = (t.expand(rows, -1).gather(1, index) for t in (query.slot, query.pos))
    # `placed`: neighboring columns are no neighboring slots
    span = Span(places, slot, pos, kept, placed=kept)
    state.call = replace(
        call, query=span, keys=span, aligned=True, newest=False, row_mask=None, memo=Memo(forgets=call.memo.forgets)
    )
    state.stream = part = before.gather(1, columns)
    state = run_blocks(stack, block, inputs, state)
    ran = mixed(part, state.stream, kept, scores.gather(1, index).sigmoid())
    state.call, state.stream = call, before.scatter(1, columns, ran)
    return state


def _check_routed(stack: LayerStack, block: Sequence[Step], inputs: PassInputs, call: Call, *, ranks: bool) -> None:
    """Raise an `InputError` if tokens of a pass cannot be chosen.

    Args:
        stack: of the block.
        block: its sublayers.
        inputs: of the pass.
        call: the pass.
        ranks: tokens are chosen by comparison with the other tokens of their row.
    """
    if ranks and call.causal and not stack.causal:
        raise InputError(
            '`depth_routing = "topk"` chooses the best tokens of a whole row, which a pass with `causal = True` must '
            'not know; drop it, or build the stack with `depth_routing = "threshold"`.'
        )
    if not any(memory is not None for memory in inputs.attention_memories):
        return
    if ranks:
        raise InputError(
            "`mems` do not say which tokens of the segment before were the best of their row (`depth_routing`); pass "
            'none, or build the stack with `depth_routing = "threshold"`.'
        )
    others = inputs.injection is not None or inputs.self_attn_inputs is not None
    if others or not block[0].kind.is_self_attention:
        raise InputError(
            "`mems` hold what self-attentions read, and routed blocks (`depth_routing`) choose tokens by the stream, "
            "which differs from it here (`macaron`, `reinject_input`, `in_attn_cond` or `self_attn_inputs`); drop one "
            "of the two."
        )
