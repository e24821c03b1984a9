"""Test-time training: after each segment every row takes a step on its own copies of some weights (2407.04620)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.losses import token_losses
from x_transformers.ops import at_least_float32
from x_transformers.test_time.places import Pair
from x_transformers.test_time.row_weights import RowWeights, TTTModuleWrapper
from x_transformers.test_time.steps import Descent

Given = TypeVar("Given")


class InnerLoss:
    """The loss of each row that its steps minimize: of its next tokens, or of a module of its own.

    It is no module itself, so that what it reads is not registered a second time.

    Args:
        custom: record and `(b, n)` mask of the labels that count to losses `(b, n)` or `(b,)`; None: of the next token.
        ignore_index: label that does not count.
        log_probs: the model returns log-probabilities.
    """

    def __init__(self, custom: nn.Module | None, ignore_index: int, log_probs: bool) -> None:
        self.custom, self.ignore_index, self.log_probs = custom, ignore_index, log_probs

    def __call__(self, logits: Tensor, labels: Tensor, record: LayerIntermediates | None) -> Tensor:
        """Return the losses `(b,)`: means over the labels that count, 0 where none does.

        Args:
            logits: `(b, n, v)`.
            labels: `(b, n)`.
            record: of the pass.

        Raises:
            InputError: if the custom loss returns another shape, or there is no record for it.
        """
        counts = labels != self.ignore_index
        if self.custom is None:
            each = token_losses(logits, labels, ignore_index=self.ignore_index, log_probs=self.log_probs)
        elif record is None:
            raise InputError("the inner loss reads the record of the pass; give it as `intermediates`.")
        else:
            each = self.custom(record, counts)
        if each.shape == labels.shape[:1]:
            return at_least_float32(each)
        if each.shape != labels.shape:
            raise InputError(
                f"`ttt_custom_loss_module` returned shape {tuple(each.shape)}; it must be {tuple(labels.shape)}, a "
                f"loss for each position, or {tuple(labels.shape[:1])}, one for each row."
            )
        kept = at_least_float32(each).masked_fill(~counts, 0.0)
        return kept.sum(dim=-1) / counts.sum(dim=-1).clamp(min=1)


class Adaptation:
    """The weights that rows adapt, and their steps.

    Args:
        pairs: which wrapper's gradients update which wrapper's weights.
        descent: the step.
        loss: of each row.
        host: returns the wrapper that runs instead of another one, as in a view for generation; default itself.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        descent: Descent,
        loss: InnerLoss,
        host: Callable[[TTTModuleWrapper], TTTModuleWrapper] | None = None,
    ) -> None:
        self.pairs, self.descent, self.loss = pairs, descent, loss
        self.hosts = {each: each if host is None else host(each) for pair in pairs for each in pair}

    def begin(self, batch: int, evaluate: bool = False) -> None:
        """Give each row its own copy of the weights.

        Args:
            batch: number of rows.
            evaluate: run the modules in evaluation mode.
        """
        for wrapper, host in self.hosts.items():
            host.rows = RowWeights(wrapper.module, batch, evaluate)

    def end(self) -> None:
        """Run the modules with their parameters again."""
        for host in self.hosts.values():
            host.reset()

    def detach(self) -> None:
        """Let no gradient flow into what the weights were before."""
        for wrapper in self.hosts:
            self._rows(wrapper).detach()

    def update(
        self, logits: Tensor, labels: Tensor, record: LayerIntermediates | None, create_graph: bool = False
    ) -> None:
        """Take one step.

        Args:
            logits: `(b, n, v)` of a pass with the present weights.
            labels: `(b, n)`.
            record: of the pass.
            create_graph: keep the step differentiable; otherwise the new weights are constants.
        """
        sources = {id(pair.source): self._rows(pair.source) for pair in self.pairs}
        names = [(key, name) for key, rows in sources.items() for name in rows.weights]
        loss = self.loss(logits, labels, record).sum()
        gradients: dict[tuple[int, str], Tensor | None] = dict.fromkeys(names)
        if loss.requires_grad:
            weights = [sources[key].weights[name] for key, name in names]
            found = torch.autograd.grad(loss, weights, create_graph=create_graph, retain_graph=True, allow_unused=True)
            gradients.update(zip(names, found, strict=True))
        for pair in self.pairs:
            target, inside = self._rows(pair.target), sources[id(pair.source)].weights
            steps = zip(target.weights.items(), inside, strict=True)
            target.weights = {name: self.descent(t, gradients[id(pair.source), theirs]) for (name, t), theirs in steps}
        if not create_graph:
            self.detach()

    def _rows(self, wrapper: TTTModuleWrapper) -> RowWeights:
        rows = self.hosts[wrapper].rows
        if rows is None:
            raise InputError("there are no weights of single rows to update; call `init_ttt` with their number first.")
        return rows


@contextmanager
def with_gradients() -> Iterator[None]:
    """Compute gradients, also where the caller has turned them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(value: Given) -> Given:
    """Return a value of which autograd may keep all tensors; those of inference mode are copied.

    Args:
        value: a tensor, or lists, tuples and mappings of tensors; anything else stays as it is.
    """
    result: Any = value
    if isinstance(value, Tensor):
        result = value.clone() if value.is_inference() else value
    elif type(value) in (list, tuple):
        result = type(value)(ordinary(each) for each in value)  # type: ignore[attr-defined]
    elif isinstance(value, Mapping):
        result = {name: ordinary(each) for name, each in value.items()}
    return result
