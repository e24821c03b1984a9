"""Steps of test-time training: gradient descent with decay, by orthogonalized gradients if wanted (Muon)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.options.schema import at_least, require


def newtonschulz5(
    t: Tensor, steps: int = 5, eps: float = 1e-7, coefs: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
) -> Tensor:
    """Return matrices with about the same singular vectors, and singular values near 1.

    From `x = t / max(|t|, eps)`, repeated: `g = x x^T`, `x <- a x + (b g + c g^2) x`.

    Args:
        t: `(..., i, j)`.
        steps: number of repetitions.
        eps: least norm to divide by.
        coefs: a, b and c.

    Raises:
        InputError: if t has no matrices.
    """
    if t.ndim < 2:
        raise InputError(f"t has shape {tuple(t.shape)}; it must hold matrices, (..., i, j).")
    tall = t.shape[-2] > t.shape[-1]
    x = t.mT if tall else t
    a, b, c = coefs
    # autocast would round what the iteration amplifies
    with torch.autocast(t.device.type, enabled=False):
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
        for _ in range(steps):
            g = x @ x.mT
            x = a * x + (b * g + c * g @ g) @ x
    return x.mT if tall else x


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Steps `w <- w - lr * gradient - lr * wd * w` of the weights of each row.

    Attributes:
        lr: step size.
        wd: decay.
        use_muon: orthogonalize the gradients of matrices.
        muon_steps: of `newtonschulz5`.
        muon_lr: step size for these gradients.

    Raises:
        ConfigError: if a number is negative.
    """

    lr: float
    wd: float
    use_muon: bool
    muon_steps: int
    muon_lr: float

    def __post_init__(self) -> None:
        for name in ("lr", "wd", "muon_lr"):
            value = getattr(self, name)
            require(value >= 0, f"`ttt_{name}` is {value}; it must be at least 0.")
        at_least(1, ttt_muon_steps=self.muon_steps)

    def __call__(self, weights: Tensor, gradient: Tensor | None) -> Tensor:
        """Return the next weights.

        Args:
            weights: `(b, ...)`.
            gradient: of the same shape; None if nothing depends on the weights, which then stay as they are.
        """
        if gradient is None:
            return weights
        lr = self.lr
        if self.use_muon and gradient.ndim >= 3:
            gradient, lr = newtonschulz5(gradient, self.muon_steps), self.muon_lr
        return weights - lr * gradient - lr * self.wd * weights
