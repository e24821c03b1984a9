"""Training of experts in a stack: whether it adds losses, and biases that balance loads without one (2408.15664)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.feedforward.experts import Experts
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.depth_routing import routed_loss
from x_transformers.layers.stack import LayerStack
from x_transformers.routing.routers import Router


class TrainsExperts(nn.Module):
    """Base class of stacks, and of models with a stack as `attn_layers`."""

    @property
    def has_aux_loss(self) -> bool:
        """True if a sublayer, or what routes tokens past blocks, has an auxiliary loss; see `return_aux_loss`."""
        stack = stack_of(self)
        return routed_loss(stack.depth_routers) or any(branch.fn.has_aux_loss for branch in stack.sublayers)

    @property
    def has_balance_bias(self) -> bool:
        """True if a router has a balance bias, which `balance_experts_` moves after each step of the optimizer."""
        return bool(_balanced_routers(stack_of(self)))

    @checked
    def balance_experts_(self, record: LayerIntermediates | Sequence[LayerIntermediates], rate: float = 1e-3) -> None:
        """Move the balance bias of each router towards equal loads, in place.

            b_e <- b_e + rate * sign(mean(c) - c_e),    then b <- b - mean(b)

        c are the loads of all passes that the records show: those of layers that ran several times, and of several
        records (accumulated gradients), are added. In a process group they are added over the processes too. Call it
        after each step of the optimizer; no pass changes a bias by itself.

        Args:
            record: of a training pass with `return_aux_loss` or `return_intermediates`, or several of them.
            rate: size of a step, for scores between 0 and 1.

        Raises:
            InputError: if no router has a balance bias, the passes recorded no loads, or `rate` is out of range.
        """
        records = [record] if isinstance(record, LayerIntermediates) else list(record)
        if not all(isinstance(each, LayerIntermediates) for each in records):
            raise InputError("`record` must be the intermediates of a pass, or a list of those of several passes.")
        if not 0 < rate <= 1:
            raise InputError(f"`rate` is {rate}; it must be positive, and at most 1, the largest score.")
        loads = _loads(stack_of(self), records)
        with torch.no_grad():
            for router, load in loads:
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(load)
                bias = router.score_bias
                assert bias is not None
                bias += rate * (load.mean() - load).sign()
                bias -= bias.mean()


def stack_of(module: nn.Module) -> LayerStack:
    """Return the stack of a model, or the stack itself."""
    stack = module if isinstance(module, LayerStack) else module.attn_layers
    assert isinstance(stack, LayerStack)
    return stack


def _balanced_routers(stack: LayerStack) -> dict[int, Router]:
    """Return the routers with a balance bias, by the index of their sublayer."""
    return {
        index: branch.fn.router
        for index, branch in enumerate(stack.sublayers)
        if isinstance(branch.fn, Experts) and isinstance(branch.fn.router, Router) and branch.fn.router.balances
    }


def _loads(stack: LayerStack, records: Iterable[LayerIntermediates]) -> list[tuple[Router, Tensor]]:
    """Return each router with a balance bias that ran, and the sum of its loads.

    Raises:
        InputError: if there is no such router, or no loads.
    """
    routers = _balanced_routers(stack)
    if not routers:
        raise InputError("no router has a balance bias; build the stack with `ff_balance_bias = True`.")
    loads: dict[int, tuple[Router, Tensor]] = {}
    for record in records:
        for each in record.routing or ():
            router = None if each.layer_index is None else routers.get(each.layer_index)
            if router is not None:
                # layers may share one router
                before = loads.get(id(router))
                loads[id(router)] = router, each.load if before is None else before[1] + each.load
    if not loads:
        raise InputError("there are no loads of experts here; run the pass with `return_aux_loss = True`.")
    return [(router, load.detach().clone()) for router, load in loads.values()]
