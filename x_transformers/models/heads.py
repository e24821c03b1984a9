"""Heads, from features to logits: linear maps, the token table (1608.05859), mixtures of softmaxes (1711.03953)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.feedforward.activations import BY_NAME, ActivationName
from x_transformers.models.embeddings import table_of
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import LoadsWhole, ReadsReference
from x_transformers.ops import at_least_float32, softclamp
from x_transformers.options.schema import at_least


class LinearNoBias(LoadsWhole, nn.Linear):
    """Linear map without a bias."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        at_least(1, dim_in=dim_in, dim_out=dim_out)
        super().__init__(dim_in, dim_out, bias=False)  # type: ignore[call-arg]


class BiasedLinear(ReadsReference, nn.Linear):
    """Linear map with a bias that starts at zero."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        at_least(1, dim_in=dim_in, dim_out=dim_out)
        super().__init__(dim_in, dim_out)  # type: ignore[call-arg]
        nn.init.zeros_(self.bias)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        _refuse_bias()


def _refuse_bias() -> NoReturn:
    raise StateDictError("the reference has no bias of logits; a model with `logits_bias` cannot be exported.")


def build_linear_head(dim: int, width: int, bias: bool) -> nn.Linear:
    """Build the map from `dim` features to `width` logits."""
    return BiasedLinear(dim, width) if bias else LinearNoBias(dim, width)


class TiedLogits(ReadsReference):
    """Logits `features @ table^T * scale + bias`, with the table of the model's token embedding.

    The model is kept in a tuple, so that it is not registered as a submodule of its head: the table has one name in the
    state dict, and is that of the embedding in place, if it was replaced. A deep copy of the model refers to the copy.

    Args:
        model: has the embedding as `token_emb`.
        scale: factor of the logits.
        bias: width of a bias that is added to them; 0 for none.
    """

    def __init__(self, model: nn.Module, scale: float, bias: int = 0) -> None:
        super().__init__()
        self._model: tuple[Any] = (model,)
        self.scale = scale
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(..., dim)` to logits `(..., v)`."""
        logits = F.linear(features, table_of(self._model[0].token_emb)) * self.scale
        return logits if self.bias is None else logits + self.bias

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if self.bias is not None:
            _refuse_bias()


class Heads(nn.ModuleList):
    """Several linear heads, each from `dim` to `width`."""

    def __init__(self, count: int, dim: int, width: int, bias: bool = False) -> None:
        super().__init__(build_linear_head(dim, width, bias) for _ in range(count))

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


class HeadTransform(LoadsWhole):
    """Map of features y before the head: `LayerNorm(act(W y + b))` (1810.04805).

    Args:
        dim: width of the features.
        width: of what the head reads.
        activation: its name.
        bias: the map and the norm have biases.
        eps: epsilon of the norm.
    """

    def __init__(
        self, dim: int, width: int, activation: ActivationName = "gelu", bias: bool = True, eps: float = 1e-5
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, width=width)
        self.dense = nn.Linear(dim, width, bias=bias)
        self.activation, self.norm = BY_NAME[activation](), LayerNorm(width, eps=eps, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(..., dim)` to `(..., width)`."""
        return self.norm(self.activation(self.dense(features)))


class FirstTokenPool(LoadsWhole):
    """`tanh(W y + b)` of the features y of the first valid token (1810.04805).

    Args:
        dim: width of the features and of the output.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.dense = nn.Linear(dim, dim)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool features.

        Args:
            features: `(b, n, dim)`.
            mask: `(b, n)` bool, the valid ones.

        Returns:
            `(b, dim)`.
        """
        if mask is None:
            first = features[:, 0]
        else:
            places = mask.to(torch.uint8).argmax(dim=-1)
            first = features.gather(1, places.view(-1, 1, 1).expand(-1, 1, features.shape[-1])).squeeze(1)
        return self.dense(first).tanh()


class LogitChanges(ReadsReference):
    """Changes of what a head reads, and of the logits z that it returns: `c tanh(s z / c)`, then perhaps
    `z + log sigmoid(z)`.

    Args:
        scale: factor s.
        softcap: bound c, or None (2408.00118).
        sigsoftmax: return what sigsoftmax takes the softmax of (1805.10829).
        transform: applied to the features before the head.
    """

    def __init__(
        self,
        scale: float = 1.0,
        softcap: float | None = None,
        sigsoftmax: bool = False,
        transform: HeadTransform | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.softcap, self.sigsoftmax, self.transform = scale, softcap, sigsoftmax, transform

    @property
    def keeps_linear(self) -> bool:
        """True if logits are a linear map of features, except for the sigmoid."""
        return self.scale == 1 and self.softcap is None and self.transform is None

    def forward(self, head: Callable[[Tensor], Any], features: Tensor) -> Any:
        """Return the changed logits of features `(..., dim)`; a tuple, if the head returns one."""
        if self.transform is not None:
            features = self.transform(features)
        return each_head(head(features), self.change)

    def change(self, logits: Tensor) -> Tensor:
        """Change logits `(..., v)`."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = softclamp(logits, self.softcap)
        return sigsoftmax(logits) if self.sigsoftmax else logits

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if not self.keeps_linear:
            raise StateDictError(
                "the reference has neither `logits_scale` nor `logits_softcap` nor `logits_transform`; a model with "
                "one cannot be exported."
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
