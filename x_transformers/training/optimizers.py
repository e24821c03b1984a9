"""Muon for the matrices of the layers (2502.16982), and the choice of these matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.attention.head_maps import HeadMaps
from x_transformers.errors import ConfigError
from x_transformers.layers.layers import AttentionLayers
from x_transformers.modules.tied_linear import matrices_of
from x_transformers.options.values import hints_of, misfits

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of `a x + b x^3 + c x^5`, which moves singular values from (0, 1] to about 1 in five steps."""


class Split(NamedTuple):
    """Trainable parameters of a model, each in one list.

    Attributes:
        matrices: linear maps inside of sublayers, for Muon.
        embeddings: tables of tokens and positions.
        others: heads, gains, biases, and everything else.
    """

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    others: list[nn.Parameter]


def split_parameters(model: nn.Module, *, queries_and_keys: bool = True) -> Split:
    """Split parameters into those for Muon and those for an element-wise optimizer such as AdamW.

    A head that is tied to the token table counts as that table.

    Args:
        model: a model or a wrapper, with any number of stacks inside; or a stack.
        queries_and_keys: include matrices of queries, keys and gates; otherwise only those of values, outputs and
            feedforwards (`muon_parameters`).

    Raises:
        ConfigError: if the model contains no stack.
    """
    stacks = [module for module in model.modules() if isinstance(module, AttentionLayers)]
    if not stacks:
        raise ConfigError(f"`model` is a {type(model).__name__} without a stack of layers (an Encoder, a Decoder ...).")
    inside = {id(module) for stack in stacks for module in stack.modules()}
    chosen: set[int] = set()
    for stack in stacks:
        maps = stack.muon_parameters()
        if queries_and_keys:
            maps += matrices_of(stack.layers)
            maps += [module.weight for module in stack.layers.modules() if isinstance(module, HeadMaps)]
        # a map from or to a single number is a vector, which cannot be orthogonalized
        chosen |= {id(weight) for weight in maps if weight.ndim in MATRICES and min(weight.shape[-2:]) > 1}
    # embeddings inside of a stack are tables of biases, not of tokens or positions
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) and id(module) not in inside
    }
    split = Split([], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = id(parameter)
            (split.matrices if key in chosen else split.embeddings if key in tables else split.others).append(parameter)
    return split


MATRICES = (2, 3, 4)
"""Numbers of axes of matrices, and of stacks of matrices, each of which is orthogonalized by itself."""


class Muon(Optimizer):
    """Optimizer that orthogonalizes momentum (2502.16982).

    `m <- beta m + (1 - beta) g`, `u = beta m + (1 - beta) g` (or `u = m` without `nesterov`),
    `W <- (1 - lr * weight_decay) W - lr * s * orthogonal(u)`, with `s = 0.2 sqrt(max(rows, columns))`
    ("match_rms_adamw", for steps as large as AdamW's) or `sqrt(max(1, rows / columns))` ("original").

    Arguments, state and steps are those of `torch.optim.Muon`. Parameters that are sharded over processes
    (`torch.distributed.fsdp.fully_shard`) keep sharded momentum; each direction is gathered for its step only, since
    orthogonalizing shards is not the same as orthogonalizing the matrix. Of stacks that are sharded along their first
    axis each process has whole matrices, and orthogonalizes these.

    Args:
        params: matrices and stacks of them (those of experts), or groups; see `split_parameters`.
        lr, weight_decay, momentum: learning rate (a number, or a tensor of one), weight decay and beta of the equations
            above.
        nesterov: Nesterov momentum.
        ns_coefficients, eps, ns_steps: of the Newton-Schulz iteration.
        adjust_lr_fn: "match_rms_adamw", "original" or None, which is "original".
        ns_dtype: of the iteration. In bfloat16 the smallest change of a gradient, as by another order of summation, can
            change a direction by half a percent; in float32 any number of processes takes the same steps.

    Raises:
        ConfigError: if a parameter is not a matrix, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        try:
            super().__init__(params, defaults)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"`params` must contain matrices, or groups of them: {error}.") from error
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step for every parameter that has a gradient.

        Args:
            closure: function that computes the loss, or None.

        Returns:
            The result of `closure`, if one is given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        kept = state["momentum_buffer"]
        kept.lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(kept, group["momentum"]) if group["nesterov"] else kept
        has_whole = _has_whole_matrices(parameter)
        whole = (cast(Any, direction).to_local() if has_whole else _whole(direction)).to(group["ns_dtype"])
        numbers = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if whole.ndim == 2:
            update = orthogonalized(whole, *numbers)
        else:
            each = [orthogonalized(matrix, *numbers) for matrix in whole.flatten(0, -3).unbind(0)]
            # a process may have no matrix of a stack
            update = torch.stack(each).view_as(whole) if each else whole
        rows, columns = parameter.shape[-2:]
        lr = group["lr"]
        matched = group["adjust_lr_fn"] == "match_rms_adamw"
        scale = 0.2 * math.sqrt(max(rows, columns)) if matched else math.sqrt(max(1, rows / columns))
        parameter.mul_(1 - lr * group["weight_decay"])
        update = update.to(parameter.dtype)
        if has_whole:
            cast(Any, parameter).to_local().add_(update, alpha=-lr * scale)
        else:
            parameter.add_(_sharded_as(update, parameter), alpha=-lr * scale)


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """Return `U V^T` of `matrix = U S V^T`, approximately: singular values are between 0.7 and 1.2.

    Newton-Schulz iteration: `x <- a x + (b g + c g^2) x`, `g = x x^T`, from `x = matrix / |matrix|`.

    Args:
        matrix: `(rows, columns)`.
        coefficients: a, b and c.
        steps: number of iterations.
        eps: least norm of the matrix.
    """
    a, b, c = coefficients
    # the products below are square matrices of the first axis, which is made the shorter one
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    # the Frobenius norm is at least the largest singular value, so that all of them are in (0, 1], where this converges
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _check(group: Mapping[str, Any]) -> None:
    # a learning rate may be a tensor, so that compiled steps read it
    numbers = {**group, "lr": group["lr"].item() if _is_single(group["lr"]) else group["lr"]}
    for sentence in misfits(hints_of(Muon.__init__), {name: numbers[name] for name in group if name != "params"}):
        raise ConfigError(sentence)
    for name, least, limit in (
        ("lr", 0, math.inf),
        ("weight_decay", 0, math.inf),
        ("momentum", 0, 1),
        ("ns_steps", 1, 100),
        ("eps", 0, math.inf),
    ):
        if not least <= numbers[name] < limit:
            bound = f"at least {least}" if limit == math.inf else f"at least {least} and less than {limit}"
            raise ConfigError(f"`{name}` is {group[name]}; it must be {bound}.")
    if not group["ns_dtype"].is_floating_point:
        raise ConfigError(f"`ns_dtype` is {group['ns_dtype']}; it must be a floating-point type, such as bfloat16.")
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ConfigError(f'`adjust_lr_fn` is {group["adjust_lr_fn"]!r}; it must be "match_rms_adamw" or "original".')
    for parameter in group["params"]:
        if parameter.ndim not in MATRICES:
            raise ConfigError(
                f"Muon takes matrices, but a parameter has shape {tuple(parameter.shape)}; use `split_parameters` to "
                "find the matrices of a model, and AdamW for its other parameters."
            )


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def _is_sharded(t: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def _has_whole_matrices(t: Any) -> bool:
    """Return True if a stack of matrices is sharded, and each process has some of the matrices."""
    if t.ndim == 2 or not _is_sharded(t):
        return False
    from torch.distributed.tensor import Replicate, Shard

    # not parts of parts, which are another kind of shards
    return all(type(each) is Replicate or (type(each) is Shard and each.dim == 0) for each in t.placements)


def _whole(t: Any) -> Tensor:
    """Gather the tensor of which each process has a part."""
    return t.full_tensor() if _is_sharded(t) else t


def _sharded_as(whole: Tensor, like: Any) -> Tensor:
    """Shard a tensor that every process has, as `like` is sharded; nothing is sent."""
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False).redistribute(
        placements=like.placements
    )
