"""Losses that steps at test time minimize, other than that of the next token."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.named_stacks import Encoder
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32
from x_transformers.options.configured import Configured
from x_transformers.options.schema import at_least, require

LOSSES = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}


def _features(intermediates: LayerIntermediates) -> Tensor:
    features = intermediates.last_layer_hiddens
    if features is None:
        raise InputError("the record has no `last_layer_hiddens`; run the model with `return_intermediates = True`.")
    return features


class TTTNextLatentPredictionLoss(Configured, ReadsReference):
    """Error of a network that predicts each next feature vector from the one before, `|f(h[t]) - h[t + 1]|`.

    Targets are constants; that of the last position is the first feature vector.

    Args:
        dim: width of the features.
        hidden_dim: inner width of the network; default `dim`.
        num_layers: number of its linear maps.
        loss_type: "smooth_l1" or "mse".

    Raises:
        ConfigError: if an option is out of range.
    """

    def __init__(
        self, *, dim: int, hidden_dim: int | None = None, num_layers: int = 3, loss_type: str = "smooth_l1"
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, hidden_dim=hidden_dim, num_layers=num_layers)
        require(loss_type in LOSSES, f"`loss_type` is {loss_type!r}; it must be {' or '.join(map(repr, LOSSES))}.")
        self.loss_type = loss_type
        widths = [dim, *[hidden_dim or dim] * (num_layers - 1), dim]
        parts: list[nn.Module] = [nn.LayerNorm(dim)]
        for number in range(num_layers):
            parts += [nn.GELU()] if number else []
            parts.append(nn.Linear(widths[number], widths[number + 1]))
        self.predictor = nn.Sequential(*parts)

    @checked
    def forward(self, intermediates: LayerIntermediates, mask: Tensor | None = None) -> Tensor:
        """Return the loss `(b, n)` of each position.

        Args:
            intermediates: record of a pass, with its features `(b, n, D)`.
            mask: `(b, n)` bool, the positions that count; a position whose next one does not count costs nothing.
        """
        features = _features(intermediates)
        targets = features.detach().roll(-1, dims=1)
        each = LOSSES[self.loss_type](self.predictor(features), targets, reduction="none")
        each = at_least_float32(each).mean(dim=-1)
        return each if mask is None else each.masked_fill(~mask.roll(-1, dims=1), 0.0)


class TTTMetaLearningTargetKLLoss(Configured, ReadsReference):
    """Divergence of a learned prediction from a learned target, which reads the whole segment: `KL(p | q)`.

    `p = softmax(P h)` and `q = softmax(Q Encoder(h))`. What is learned at test time is itself learned in training, by
    differentiating through the steps.

    Args:
        dim: width of the features.
        num_classes: number of classes of both distributions.
        depth, heads, dim_head: of the encoder.
        kwargs: further keywords of the encoder.

    Raises:
        ConfigError: if an option is out of range.
    """

    def __init__(
        self, *, dim: int, num_classes: int, depth: int = 1, heads: int = 4, dim_head: int = 64, **kwargs: Any
    ) -> None:
        super().__init__()
        at_least(1, dim=dim)
        at_least(2, num_classes=num_classes)
        self.to_prediction = nn.Linear(dim, num_classes)
        self.encoder = Encoder(dim=dim, depth=depth, heads=heads, attn_dim_head=dim_head, **kwargs)
        self.to_meta_prediction = nn.Linear(dim, num_classes)

    @checked
    def forward(self, intermediates: LayerIntermediates, mask: Tensor | None = None) -> Tensor:
        """Return the divergence `(b, n)` at each position.

        Args:
            intermediates: record of a pass, with its features `(b, n, D)`.
            mask: `(b, n)` bool, the positions that the encoder sees.
        """
        features = _features(intermediates)
        target = self.to_meta_prediction(self.encoder(features, mask=mask))
        log_p, log_q = (
            at_least_float32(logits).log_softmax(dim=-1) for logits in (self.to_prediction(features), target)
        )
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
