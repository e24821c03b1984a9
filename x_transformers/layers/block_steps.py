"""One block of a pass: as usual, again for its gradients, or no more of it than later tokens need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.layers.execution_order import Step
from x_transformers.layers.pass_state import PassInputs, PassState
from x_transformers.layers.runner import recomputes, run_recomputing, run_steps
from x_transformers.layers.stack import LayerStack


def run_blocks(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run some blocks, and return the state after them.

    Args:
        stack: of the blocks.
        steps: their sublayers.
        inputs: of the pass.
        state: before them.
    """
    if stack.checkpoint_every is not None and recomputes(stack, state):
        return run_recomputing(stack, steps, inputs, state)
    run_steps(stack, steps, inputs, state)
    return state


def rest(stack: LayerStack, block: Sequence[Step], inputs: PassInputs, state: PassState) -> None:
    """Run no more of a block than writes what later tokens read: usually its keys and values.

    Args:
        stack: of the block.
        block: its sublayers.
        inputs: of the pass.
        state: before the block; its stream is what the sublayers that ran make of it.
    """
    writers = [nth for nth, step in enumerate(block) if _writes(stack, step, state)]
    last = writers[-1] if writers else -1
    if last > 0 and stack.parallel:
        # its sublayers read the stream before the block, and so run together
        run_steps(stack, block[: last + 1], inputs, state)
    elif last >= 0:
        run_steps(stack, block[:last], inputs, state)
        state.rests = True
        run_steps(stack, block[last : last + 1], inputs, state)
        state.rests = False
    assert state.kv is not None
    for step in block[last + 1 :]:
        if step.kind.is_attention:
            entry = state.kv.entry(step.number)
            record = Intermediates(layer_type=step.kind.letter, layer_index=step.layer, entry=entry)
            state.recorder.records.append(record)


def _writes(stack: LayerStack, step: Step, state: PassState) -> bool:
    """Return True if a sublayer leaves something for later tokens; the keys of a context are there already."""
    assert state.kv is not None
    branch = stack.sublayers[step.layer]
    if step.kind.is_cross_attention and not branch.running:
        return state.kv.entry(step.number).get("k") is None
    return branch.uses_cache


def may_rest(stack: LayerStack, inputs: PassInputs, state: PassState) -> bool:
    """Return True if sublayers may be left out as soon as the host knows that their outputs are not needed.

    A graph, of the compiler or of a GPU, does the same for every token; a gradient or a record may need the outputs.

    Args:
        stack: of the sublayers.
        inputs: of the pass.
        state: of the pass.
    """
    capture, device = state.call.capture, state.stream.device
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or state.kv is None:
        return False
    if stack.skip_sources or inputs.exits or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return not (capture.scores or capture.hiddens or capture.memories or capture.losses or capture.routing)
