"""Steps that a GPU replays: the kernels of one step, recorded once for each text as a CUDA graph.

For a few tokens a GPU computes a kernel sooner than Python launches the next one. A step over a settled static cache
changes nothing but the values of tensors, so its kernels can be recorded, and launched by a single call for each token.
A recording belongs to one text: it refers to the buffers of its cache, and its memory is freed with the reader.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from x_transformers.cache import KVCache
from x_transformers.decoding.step import FirstStep, Step, advance
from x_transformers.models.base import Model

WORTH = 32
"""Least number of tokens for which a step is recorded, which takes as long as a few steps that run kernel by kernel."""

FirstResult = tuple[Tensor, Step]


class Recorder(Protocol):
    """Records what a function lets a device do."""

    def rehearse(self, run: Callable[[], FirstResult]) -> FirstResult:
        """Run a first step as it will be recorded, so that libraries allocate what they need beforehand."""
        ...

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Record a step without computing it.

        Returns:
            the tensor of its result, and a function that computes the step and writes into that tensor.

        Raises:
            RuntimeError: if the step waits for the device, or does something else that cannot be recorded.
        """
        ...


class CudaGraphs:
    """Records kernels as CUDA graphs.

    Args:
        device: the GPU.
    """

    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rehearse(self, run: Callable[[], FirstResult]) -> FirstResult:
        with torch.cuda.device(self.device):
            stream, current = _recording_stream(self.device), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                logits, step = run()
            current.wait_stream(stream)
            logits.record_stream(current)
            return logits, step

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        # One recording at a time; what other threads do with the device meanwhile does not disturb it. The context
        # `torch.cuda.graph` would first collect garbage and free cached memory, which takes longer than to record.
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(_recording_stream(self.device)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        return result, graph.replay


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all recordings: libraries keep a workspace for each stream that they have run on."""
    return torch.cuda.Stream(device)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}
"""Recorders by type of device."""


def recorder_for(net: Model, count: int, compile: bool | Mapping[str, Any] = False) -> Recorder | None:
    """Return what records the steps of a model, or None where they run one by one.

    Args:
        net: the model, whose modules all belong to this package or to PyTorch, without hooks.
        count: number of tokens that will be generated.
        compile: as in `generate`. A mode, or options, of the compiler decide about CUDA graphs themselves.
    """
    device = next(net.parameters()).device
    make = RECORDERS.get(device.type)
    if make is None or count < WORTH or net.layout.every is not None:
        return None
    if isinstance(compile, Mapping) and {"mode", "options"} & set(compile):
        return None
    # autocast keeps casts of weights, which would be freed before the recording
    return None if torch.is_autocast_enabled(device.type) else make(device)


class RecordedStep:
    """Records the steps of texts.

    Args:
        recorder: of the device.
        first: runs the first step of a text, and returns what runs the steps after it; default: ordinary passes.
    """

    def __init__(self, recorder: Recorder, first: FirstStep | None = None) -> None:
        self._recorder, self._first = recorder, _plain_first if first is None else first

    def first(
        self, net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]
    ) -> FirstResult:
        """Run the first step of a text; return its logits, and what runs the steps after it."""
        logits, step = self._recorder.rehearse(lambda: self._first(net, token, cache, start, arguments))
        return logits, Recording(step, self._recorder, net, cache, (start, arguments))


def _plain_first(
    net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]
) -> FirstResult:
    return advance(net, token, cache, start, arguments), advance


class Recording:
    """The steps of one text after its first one: recorded at the first call, and replayed for every token.

    A tensor among the arguments that was the same object in the first step of the text is read where it lies; the
    others are copied into buffers at each step. A step with arguments that do not fit runs as it is: both leave the
    same state in the cache.

    Args:
        step: runs one step.
        recorder: records it.
        net, cache: of the text.
        given: other arguments of its first step.
    """

    def __init__(self, step: Step, recorder: Recorder, net: Model, cache: KVCache, given: tuple[Any, ...]) -> None:
        self._step, self._recorder, self._text = step, recorder, (net, cache)
        self._given, self._leaves, self._structure = given, *tree_flatten(given)
        self._replay: Callable[[], object] | None = None
        self._failed = False

    def __call__(
        self, net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        if self._failed:
            return self._step(net, token, cache, start, arguments)
        if self._replay is None:
            self._record(token, (start, arguments))
        if not self._takes(net, token, cache, (start, arguments)) or self._replay is None:
            return self._step(net, token, cache, start, arguments)
        self._replay()
        # a copy: the next step writes into the tensor, and callers may keep what they get
        return self._logits.clone()

    def _record(self, token: Tensor, given: tuple[Any, ...]) -> None:
        """Record the step, with buffers for the tensors that are other objects than in the first step."""
        leaves, structure = tree_flatten(given)
        if structure != self._structure:
            self._failed = True
            return
        self._token = token.clone()
        # arguments that are the same objects in all steps need not be looked at
        self._copies = any(leaf is not earlier for leaf, earlier in zip(leaves, self._leaves, strict=True))
        self._buffers = [
            leaf.clone() if isinstance(leaf, Tensor) and leaf is not earlier else earlier
            for leaf, earlier in zip(leaves, self._leaves, strict=True)
        ]
        start, arguments = tree_unflatten(self._buffers, structure)
        net, cache = self._text
        try:
            self._logits, self._replay = self._recorder.record(
                lambda: self._step(net, self._token, cache, start, arguments)
            )
        except RuntimeError as error:
            self._failed = True
            _warn(str(error).strip().partition("\n")[0])

    def _takes(self, net: Model, token: Tensor, cache: KVCache, given: tuple[Any, ...]) -> bool:
        """Copy the arguments of a step into the buffers; return False if they do not fit."""
        if self._failed or (net, cache) != self._text or not _like(token, self._token):
            return False
        if self._copies or any(one is not two for one, two in zip(given, self._given, strict=True)):
            leaves, structure = tree_flatten(given)
            if structure != self._structure or not all(map(_fits, leaves, self._buffers, self._leaves)):
                return False
            for leaf, buffer in zip(leaves, self._buffers, strict=True):
                if isinstance(leaf, Tensor) and leaf is not buffer:
                    buffer.copy_(leaf)
        self._token.copy_(token)
        return True


def _fits(leaf: Any, buffer: Any, earlier: Any) -> bool:
    """Return True if a leaf of the arguments is what was recorded, or a tensor that fits into its buffer."""
    if leaf is buffer:
        return True
    if isinstance(leaf, Tensor):
        # the tensor of a caller is no buffer
        return isinstance(buffer, Tensor) and buffer is not earlier and _like(leaf, buffer)
    return type(leaf) is type(buffer) and isinstance(leaf, (bool, int, float, str)) and leaf == buffer


def _like(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and one.device == two.device


@functools.cache
def _warn(reason: str) -> None:
    """Say once for each reason that steps run one by one."""
    logger.warning(f"The step of a token cannot be recorded as a CUDA graph, and runs kernel by kernel: {reason}")
