"""Compiled steps of one token, and compiled reading of prompts.

A compiled function checks before each call whether its graph still fits (its *guards*), which takes as long as a layer.
While one text is generated nothing changes but the values of tensors, so the first step checks, and those after it run
the graph that the first one used.
"""

from __future__ import annotations

import os
import threading
import weakref
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.cache import KVCache, StaticCache
from x_transformers.decoding.step import Prefill, Step, advance, read_prompt
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.base import Model
from x_transformers.modules.inference import InferenceView


class CompiledReading(NamedTuple):
    """Compiled functions of one model, for calls of one structure.

    Attributes:
        step: reads one token.
        prefill: reads a prompt.
        view: what they have been compiled for.
    """

    step: CompiledStep
    prefill: Prefill
    view: InferenceView


class CompiledStep:
    """`advance`, compiled to a full graph.

    Args:
        options: of `torch.compile`. A mode, or options of the compiler, may switch on its own CUDA graphs.
    """

    def __init__(self, **options: Any) -> None:
        self._may_graph = bool({"mode", "options"} & set(options))
        # PyTorch keeps, and limits, the graphs of each code object; every model has a copy of its own
        self._own = FunctionType(advance.__code__.replace(), advance.__globals__, "advance")
        if options.get("backend", "inductor") == "inductor" and not {"mode", "options"} & set(options):
            # a step has 14 inputs a layer, whose shapes would be checked again for each token
            options["options"] = {"size_asserts": False}
        self._checked = torch.compile(self._own, **{"fullgraph": True, **options})
        self._lock = threading.Lock()
        _STEPS.add(self)

    def first(
        self, net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, Step]:
        """Run the first step of a text; return its logits, and what runs the steps after it."""
        if self._may_graph:
            mark_static(cache)
        # another thread's call would move its own graph to the front
        with self._lock:
            logits = self._checked(net, token, cache, start, arguments)
            return logits, self._newest() or self._checked

    def _newest(self) -> Step | None:
        """Return the graph that ran last, without guards, or None if this version of PyTorch does not show it.

        `torch.compiler.set_stance(skip_guard_eval_unsafe=True)` would do the same for all threads of the process, whose
        functions would then run whatever graph they ran last.
        """
        try:
            from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
            from torch._dynamo.mutation_guard import GenerationTracker

            # PyTorch moves the entry whose guards held to the front of its list
            code = _debug_get_cache_entry_list(self._own.__code__)[0].code
        except (ImportError, AttributeError, IndexError, TypeError):
            return None
        run = FunctionType(code, self._own.__globals__, "advance")

        def step(net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]) -> Tensor:
            # as an ordinary call does: CUDA graphs then know that the outputs of the step before may be overwritten
            GenerationTracker.generation += 1
            return run(net, token, cache, start, arguments)

        return step


def mark_static(cache: KVCache) -> None:
    """Mark tensors that steps write into: they stay where they are, so that writing does not rule out CUDA graphs."""
    tensors = [t for entry in cache.entries for t in (*entry.grown.values(), *entry.states.values())]
    if isinstance(cache, StaticCache):
        tensors.append(cache.filled)
    if cache.positions is not None:
        tensors.append(cache.positions)
    for t in tensors:
        # without a guard: the next text has a cache of its own, and runs the same graph
        torch._dynamo.mark_static_address(t, guard=False)


_STEPS: weakref.WeakSet[CompiledStep] = weakref.WeakSet()


def _unlock() -> None:
    """In a forked child only the thread that forked goes on: no other one will unlock what it had locked."""
    for step in list(_STEPS):
        step._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def compiled_prefill(**options: Any) -> Prefill:
    """Compile `read_prompt` to one full graph for prompts of all lengths."""
    own = FunctionType(read_prompt.__code__.replace(), read_prompt.__globals__, "read_prompt")
    run = torch.compile(own, **{"fullgraph": True, **options})

    def prefill(
        net: Model, tokens: Tensor, cache: KVCache, start: Tensor | None, arguments: Any, last: int
    ) -> tuple[Tensor, LayerIntermediates]:
        # a hint: `mark_dynamic` would raise an error where a length is specialized, as 1 always is
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return run(net, tokens, cache, start, arguments, last)

    return prefill
