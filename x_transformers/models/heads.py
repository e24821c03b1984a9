"""Heads, from features to logits: linear maps, the token table (1608.05859), mixtures of softmaxes (1711.03953)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.models.embeddings import table_of
from x_transformers.modules.state_dict import LoadsWhole, ReadsReference
from x_transformers.ops import at_least_float32, softclamp
from x_transformers.options.schema import at_least


class LinearNoBias(LoadsWhole, nn.Linear):
    """Linear map without a bias."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        at_least(1, dim_in=dim_in, dim_out=dim_out)
        super().__init__(dim_in, dim_out, bias=False)  # type: ignore[call-arg]


class TiedLogits(nn.Module):
    """Logits `features @ table^T * scale`, with the table of the model's token embedding.

    The model is kept in a tuple, so that it is not registered as a submodule of its head: the table has one name in the
    state dict, and is that of the embedding in place, if it was replaced. A deep copy of the model refers to the copy.

    Args:
        model: has the embedding as `token_emb`.
        scale: factor of the logits.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self._model: tuple[Any] = (model,)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(..., dim)` to logits `(..., v)`."""
        return F.linear(features, table_of(self._model[0].token_emb)) * self.scale


class Heads(nn.ModuleList):
    """Several linear heads, each from `dim` to `width`."""

    def __init__(self, count: int, dim: int, width: int) -> None:
        super().__init__(LinearNoBias(dim, width) for _ in range(count))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Map features `(..., dim)` to a tuple of logits `(..., width)`."""
        return tuple(head(features) for head in self)


class MixtureOfSoftmax(nn.Module):
    """Log-probabilities `log sum_j w_j softmax(head(y_j))`, `w = softmax(C y)`, `y_1 ... y_k = T y` (1711.03953).

    Args:
        dim: width of the features y.
        k: number of softmaxes.
    """

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.to_mixture = nn.Sequential(LinearNoBias(dim, dim * k))
        self.combine_mixture = LinearNoBias(dim, k)

    def forward(self, features: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return log-probabilities `(..., v)`.

        Args:
            features: `(..., dim)`.
            head: map from features to logits.
        """
        logits = head(self.to_mixture(features).unflatten(-1, (self.k, -1)))
        weights = self.combine_mixture(features)
        # small probabilities of one softmax would vanish in half precision before they are mixed with those of the
        # others
        with torch.autocast(features.device.type, enabled=False):
            each = at_least_float32(logits).log_softmax(dim=-1)
            shares = at_least_float32(weights).log_softmax(dim=-1)
            return (each + shares.unsqueeze(-1)).logsumexp(dim=-2).to(features.dtype)


class LogitChanges(ReadsReference):
    """Changes of logits z that a head returns: `c tanh(s z / c)`, then perhaps `z + log sigmoid(z)`.

    Args:
        scale: factor s.
        softcap: bound c, or None (2408.00118).
        sigsoftmax: return what sigsoftmax takes the softmax of (1805.10829).
    """

    def __init__(self, scale: float = 1.0, softcap: float | None = None, sigsoftmax: bool = False) -> None:
        super().__init__()
        self.scale, self.softcap, self.sigsoftmax = scale, softcap, sigsoftmax

    def forward(self, head: Callable[[Tensor], Any], features: Tensor) -> Any:
        """Return the changed logits of features `(..., dim)`; a tuple, if the head returns one."""
        return each_head(head(features), self.change)

    def change(self, logits: Tensor) -> Tensor:
        """Change logits `(..., v)`."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = softclamp(logits, self.softcap)
        return sigsoftmax(logits) if self.sigsoftmax else logits

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if self.scale != 1 or self.softcap is not None:
            raise StateDictError(
                "the reference has neither `logits_scale` nor `logits_softcap`; a model with one cannot be exported."
            )


def sigsoftmax(logits: Tensor) -> Tensor:
    """Return `z + log sigmoid(z)`, whose softmax is `exp(z) sigmoid(z)`, normalized (1805.10829)."""
    return logits + F.logsigmoid(logits)


def next_embedding_head(dim: int, emb_dim: int) -> nn.Module:
    """Build the map `W2 silu(W1 y)` from features to the embedding of the next token."""
    return nn.Sequential(LinearNoBias(dim, dim), nn.SiLU(), LinearNoBias(dim, emb_dim))


def each_head(logits: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply `fn` to logits, or to the logits of each of several heads."""
    return tuple(fn(each) for each in logits) if isinstance(logits, tuple) else fn(logits)
