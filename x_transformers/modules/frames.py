"""Functions whose loop stays outside of graphs, so that `torch.compile` makes a graph of what one turn of it calls.

A graph contains every turn of a loop, and serves one number of turns only. A compiled function whose loop is skipped
runs it in Python, and its turns are calls of the same graph. Inside of a graph of somebody else, it is traced as usual.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def skipped(function: Function) -> Function:
    """Leave the body of a function out of graphs, but not the functions that it calls.

    `torch.compiler.disable(recursive = False)` does this too, but imports the compiler, which takes a second, and its
    function cannot be part of a larger graph.
    """
    # not part of PyTorch's interface; without it the loop is traced
    with contextlib.suppress(ImportError, AttributeError):
        _skip(function.__code__)
    return function


def _skip(code: CodeType) -> None:
    from torch._C._dynamo import eval_frame

    # names that type checkers do not know differ between versions of PyTorch
    frames: Any = eval_frame
    strategy = getattr(frames, "_FrameExecStrategy", None)
    if strategy is None:  # before PyTorch 2.7
        frames.skip_code(code)
    else:
        frames.set_code_exec_strategy(code, strategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT))


@skipped
def without_graphs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function from a skipped one, and leave it and what it calls out of graphs."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return function(*args, **kwargs)
    return _disabled()(function, *args, **kwargs)


@functools.cache
@skipped
def _disabled() -> Callable[..., Any]:
    return torch.compiler.disable(lambda function, *args, **kwargs: function(*args, **kwargs))


def of_any_length(value: Any, length: int) -> Any:
    """Return a value that graphs made for it take at any length.

    Args:
        value: a tensor, or lists or dicts of tensors; anything else stays as it is.
        length: size of the axes that may have another one next time.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return value
    if isinstance(value, Mapping):
        return {name: of_any_length(each, length) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [of_any_length(each, length) for each in value]
    if not isinstance(value, torch.Tensor) or length not in value.shape:
        return value
    # steps of a slice are those of the whole, and would be numbers of the graph
    value = value.clone(memory_format=torch.contiguous_format)
    for axis, size in enumerate(value.shape):
        if size == length:
            # a hint: `mark_dynamic` would raise an error where a length is specialized, as 1 always is
            torch._dynamo.maybe_mark_dynamic(value, axis)
    return value
