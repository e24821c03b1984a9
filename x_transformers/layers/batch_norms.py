"""Norms with statistics of batches in a stack: they advance after a step of the optimizer (2405.11582)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from x_transformers.errors import InputError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.call import NormStatistics
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.experts import stack_of
from x_transformers.layers.stack import LayerStack
from x_transformers.modules.prepbn import PENDING, PrepBN, joined


class AdvancesNorms(nn.Module):
    """Base class of stacks, and of models with a stack as `attn_layers`."""

    @property
    def has_batch_norms(self) -> bool:
        """True if norms need statistics of batches; see `advance_norms`."""
        return stack_of(self).batch_norms

    @checked
    def advance_norms(self, record: LayerIntermediates | Sequence[LayerIntermediates] | None = None) -> None:
        """Count a training step in each norm of `use_prepbn`, and update its running statistics, in place.

            mean <- 0.9 * mean + 0.1 * mean of the step,    var <- 0.9 * var + 0.1 * variance of the step

        Call it after each step of the optimizer; no pass changes a norm by itself. The tokens of several passes
        (accumulated gradients, layers that run several times) and of all processes count together.

        Args:
            record: of a training pass with `return_aux_loss` or `return_intermediates`, or several of them; None: all
                passes since the last call in which an objective, such as `AutoregressiveWrapper`, computed a training
                loss.

        Raises:
            InputError: if there are no such norms, or no statistics.
        """
        norms = _norms_of(self)
        if not norms:
            raise InputError("no norm has statistics of batches; build the stack with `use_prepbn = True`.")
        if record is not None:
            forget_statistics(self)
            self.note_norms(record)  # type: ignore[reportCallIssue]
        found = [(norm, PENDING.pop(norm, None)) for norm in norms]
        if all(seen is None for _, seen in found):
            raise InputError(
                "there are no statistics of norms here; run a pass in training mode with `return_aux_loss = True`, or "
                "compute the loss of a wrapper in training mode."
            )
        for norm, seen in found:
            if seen is not None:
                norm.advance(seen)

    @torch.compiler.disable
    @checked
    def note_norms(self, record: LayerIntermediates | Sequence[LayerIntermediates]) -> None:
        """Keep the statistics of passes for the next `advance_norms()`; objectives call it after a training pass.

        Args:
            record: of a training pass, or several of them.
        """
        records = [record] if isinstance(record, LayerIntermediates) else list(record)
        of_norms: dict[int, list[NormStatistics]] = {}
        for one in records:
            for each in one.norm_statistics or ():
                of_norms.setdefault(each.number, []).append(each)
        for norm in _norms_of(self):
            seen = of_norms.get(norm.number, [])
            if seen:
                earlier = [PENDING[norm]] if norm in PENDING else []
                PENDING[norm] = joined([*earlier, *seen])


def advance_all_norms(module: nn.Module) -> None:
    """Advance the norms of all stacks in a module, such as a wrapper, after a step of the optimizer.

    Args:
        module: anything; stacks without `use_prepbn` stay as they are.
    """
    for stack in module.modules():
        if isinstance(stack, LayerStack) and isinstance(stack, AdvancesNorms) and stack.batch_norms:
            stack.advance_norms()


def forget_statistics(module: nn.Module) -> None:
    """Drop the statistics of passes after which no step of the optimizer follows.

    Args:
        module: anything.
    """
    for norm in module.modules():
        if isinstance(norm, PrepBN):
            PENDING.pop(norm, None)


def _norms_of(module: nn.Module) -> list[PrepBN]:
    """Return the norms of a stack, or of the stack of a model, that need statistics."""
    return [each for each in stack_of(module).modules() if isinstance(each, PrepBN)]
