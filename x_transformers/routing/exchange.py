"""Experts that are divided among processes: rows travel to the process that has their expert, and back (2006.16668)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from x_transformers.routing.dispatch import Dispatch, TakeCopies, sort_by_expert, take_copies


class Exchange:
    """Exchange of rows among processes, each of which has an equal part of the experts, in order.

    Args:
        mesh: a `DeviceMesh`, along whose last axis the experts are divided. Along an axis before it are replicas, which
            exchange nothing.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.size: int = mesh.size(mesh.ndim - 1)

    def __deepcopy__(self, memo: Any) -> Exchange:
        return self  # processes cannot be copied

    @property
    def group(self) -> Any:
        """The processes that exchange rows with this one."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def __call__(self, rows: Tensor, dispatch: Dispatch, compute: Callable[[Tensor, Dispatch], Tensor]) -> Tensor:
        """Return what the experts make of rows; all processes have to call this.

        Args:
            rows: `(R, D)` rows of this process, sorted by expert.
            dispatch: where the rows of each of the E experts end.
            compute: applies the experts of this process to `(R', D)` rows, sorted by expert.

        Returns:
            `(R, D')`, in the order of `rows`.
        """
        return _computed(self, rows, dispatch, compute)

    def own(self, stacks: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """Return the experts of this process, tensors `(E', ...)` or None, of stacks `(E, ...)`.

        Gradients are means over processes, as those of all other parameters are: rows of every process contribute.

        Args:
            stacks: sharded parameters, or None.
            dtype: of the rows, in which the other parameters may have been gathered.
        """
        found: list[Any] = []
        for stack in stacks:
            local = None if stack is None else stack.to_local(grad_placements=stack.placements)
            if local is not None and local.requires_grad:
                local.register_hook(self._mean)
            found.append(None if local is None else local.to(dtype))
        return found

    def _mean(self, gradient: Tensor) -> Tensor:
        return gradient / self.size

    def of_all(self, stack: Any, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `(E, ...)`, what each process computes of its experts, without gradients.

        Args:
            stack: `(E, ...)` sharded parameter.
            compute: function of the experts of a process, `(E', ...)`.
        """
        return _of_all(self, stack, compute)


def _computed_elsewhere(
    exchange: Exchange, rows: Tensor, dispatch: Dispatch, compute: Callable[[Tensor, Dispatch], Tensor]
) -> Tensor:
    group = exchange.group
    counts = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1)).to(torch.int64)
    sent = counts.unflatten(0, (exchange.size, -1)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    from_each, to_each = torch.stack((received, sent)).sum(dim=-1).tolist()
    theirs: Tensor = ExchangeRows.apply(rows, from_each, to_each, group)
    # these are sorted by process, and those of one process by expert
    own = received.shape[-1]
    experts = torch.arange(own, device=rows.device).repeat(exchange.size)
    experts = experts.repeat_interleave(received.flatten(), output_size=sum(from_each))
    here = sort_by_expert(experts.unsqueeze(-1), own)
    out = compute(take_copies(theirs, here), here)
    out = TakeCopies.apply(out, here.inverse, here.order, 1)
    back: Tensor = ExchangeRows.apply(out, to_each, from_each, group)
    return back


def _gathered(exchange: Exchange, stack: Any, compute: Callable[[Tensor], Tensor]) -> Tensor:
    from torch.distributed.tensor import DTensor

    own = compute(stack.detach().to_local())
    return DTensor.from_local(own, exchange.mesh, stack.placements, run_check=False).full_tensor()


# lengths of buffers depend on the choices, which no graph may read
_computed: Any = torch.compiler.disable(_computed_elsewhere)
_of_all: Any = torch.compiler.disable(_gathered)


class ExchangeRows(torch.autograd.Function):
    """`all_to_all_single`, whose gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, from_each: list[int], to_each: list[int], group: Any) -> Tensor:
        ctx.given = from_each, to_each, group
        received = rows.new_empty(sum(from_each), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), from_each, to_each, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        from_each, to_each, group = ctx.given
        back: Tensor = ExchangeRows.apply(gradient, to_each, from_each, group)
        return back, None, None, None
