"""Modules whose weights differ from row to row of a batch.

Each row begins with a copy of the module's parameters, which steps at test time change. The module runs once for all
rows, by `torch.func.vmap`; its own parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from x_transformers.errors import ConfigError, InputError
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import at_least_float32

Copied = TypeVar("Copied", bound=nn.Module)


class RowWeights:
    """Copies of a module's parameters for each row, and the calls of the module with them.

    The copies are differentiable functions of the parameters, at least in float32, so that small steps are not rounded
    away. Nothing here changes the module: generation shares its tensors with other threads.

    Args:
        module: maps `(b, n, ...)` to `(b, n, ...)`, each token by itself; or takes no input.
        batch: number of rows b.
        evaluate: run the module in evaluation mode, whatever mode it is in.

    Attributes:
        weights: `(b, ...)` by the names of the parameters.
    """

    def __init__(self, module: nn.Module, batch: int, evaluate: bool = False) -> None:
        own = shallow_copy(module)
        if evaluate:
            own.eval()
        self.batch = batch
        self.weights = {name: _for_each_row(p, batch) for name, p in module.named_parameters()}
        dtypes = {name: p.dtype for name, p in module.named_parameters()}
        looks_up = any(isinstance(each, nn.Embedding) for each in module.modules())

        # a function, in which views for generation look for no modules that they would replace
        def call(*args: Any, **kwargs: Any) -> Tensor:
            weights = {name: t.to(dtypes[name]) for name, t in self.weights.items()}
            if not args:
                return vmap(lambda weights: functional_call(own, weights, (), kwargs))(weights)
            x, *others = args
            x, axis = _by_row(x, batch, looks_up, type(module).__name__)

            def of_row(weights: dict[str, Tensor], row: Tensor) -> Tensor:
                return functional_call(own, weights, (row.unsqueeze(0), *others), kwargs).squeeze(0)

            return vmap(of_row, in_dims=(0, axis), randomness="different")(weights, x)

        self.call: Callable[..., Tensor] = call

    def detach(self) -> None:
        """Let no gradient flow into what the weights were before."""
        self.weights = {name: t.detach().requires_grad_() for name, t in self.weights.items()}


def shallow_copy(module: Copied) -> Copied:
    """Return a module with submodules of its own, which shares parameters, buffers and everything else."""
    own: Any = object.__new__(type(module))
    own.__dict__.update(module.__dict__)
    own.__dict__["_parameters"] = dict(module._parameters)
    own.__dict__["_modules"] = {
        name: None if child is None else shallow_copy(child) for name, child in module._modules.items()
    }
    return own


def _for_each_row(parameter: Tensor, batch: int) -> Tensor:
    copies = at_least_float32(parameter).expand(batch, *parameter.shape)
    # a frozen parameter is adapted too, and stays frozen
    return copies if copies.requires_grad else copies.detach().requires_grad_()


def _by_row(x: Tensor, batch: int, looks_up: bool, name: str) -> tuple[Tensor, int | None]:
    """Return the input, and its axis of rows; None if it is the same for all of them."""
    if looks_up and x.ndim < 2:  # ids or positions `(n,)`
        return x, None
    if x.ndim >= (2 if looks_up else 3) and x.shape[0] in (1, batch):
        return x.expand(batch, *x.shape[1:]), 0
    raise InputError(
        f"the {name} that is adapted to each of {batch} rows is called with a tensor of shape {tuple(x.shape)}, which "
        f"has no axis of {batch} rows; adapt modules that read `(b, n, D)`, one token like the other."
    )


class TTTModuleWrapper(LoadsWhole):
    """A module that may have weights of its own for each row of a batch.

    Args:
        module: the module; its entries in state dicts are below `module`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.rows: RowWeights | None = None

    def reset(self) -> None:
        """Run the module with its parameters again, the same for all rows."""
        self.rows = None

    @staticmethod
    def reset_all(module: nn.Module) -> None:
        """Reset all wrappers inside of a module."""
        for each in module.modules():
            if isinstance(each, TTTModuleWrapper):
                each.reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with the weights of each row if there are any."""
        return self.module(*args, **kwargs) if self.rows is None else self.rows.call(*args, **kwargs)


class LowRankLinear(LoadsWhole):
    """Linear map with a matrix of low rank, `A B x + b`.

    Args:
        module: the linear map that it replaces, whose widths and bias it takes over.
        low_rank_dim: the rank.

    Raises:
        ConfigError: if the rank is not below both widths.
    """

    def __init__(self, module: nn.Linear, low_rank_dim: int) -> None:
        super().__init__()
        out, into = module.weight.shape
        if not 1 <= low_rank_dim < min(out, into):
            raise ConfigError(
                f"a rank of {low_rank_dim} is given for a map from {into} to {out} features; it must lie between 1 and "
                f"{min(out, into) - 1}."
            )
        kind: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
        self.weight_a = nn.Parameter(torch.randn(out, low_rank_dim, **kind))
        self.weight_b = nn.Parameter(torch.zeros(low_rank_dim, into, **kind))
        self.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(F.linear(x, self.weight_b), self.weight_a, self.bias)
