"""Steps of autograd with a backward pass written by hand, and when the plain operations are needed instead.

Such a step takes fewer kernels than the operations that it consists of, and keeps less for the backward pass. It is for
eager mode: compilers fuse the operations, and `torch.func`, forward mode and traces need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, ...])


def needs_operations() -> bool:
    """Return True where every operation has to be seen: in graphs, traces, `torch.func` and forward mode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None


def is_exporting(*, unknown: bool = False) -> bool:
    """Return True inside of `torch.export`: programs serve every length, and have no operators of this library.

    Args:
        unknown: the result in a graph of PyTorch 2.6, which does not say what it is for.
    """
    # `torch.compiler.is_exporting()` is true in every graph of PyTorch 2.7 to 2.12
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return unknown and torch.compiler.is_compiling() if flag is None else flag


def needs_formula(*gradients: Tensor | None) -> bool:
    """Return True if a backward pass should differentiate the plain operations.

    Args:
        gradients: of the outputs. With `is_grads_batched` many operations have no batched form, but their own
            backward passes do.
    """
    if torch.is_grad_enabled():  # second derivatives
        return True
    return any(each is not None and is_legacy_batchedtensor(each) for each in gradients)


def by_formula(
    formula: Callable[..., Outputs], inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradient of each input, by autograd; differentiable if gradients need gradients themselves.

    Args:
        formula: the plain operations, inputs to outputs.
        inputs: tensors, or None.
        gradients: of the outputs; None for an output that nobody reads.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: one tensor may depend on another, which must not get the gradient of that path here
        own = [None if t is None else t.view_as(t) if create else t.detach() for t in inputs]
        for mine, t in zip(own, inputs, strict=True):
            if mine is not None and t is not None and not create:
                mine.requires_grad_(t.requires_grad)
        found = formula(*own)
        outputs = (found,) if isinstance(found, Tensor) else found
        wanted = [t for t in own if t is not None and t.requires_grad]
        read = [(out, up) for out, up in zip(outputs, gradients, strict=True) if up is not None]
        each = iter(torch.autograd.grad([out for out, _ in read], wanted, [up for _, up in read], create_graph=create))
    return [next(each) if t is not None and t.requires_grad else None for t in own]
