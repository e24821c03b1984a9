"""A decoder that learns by predicting its own later states; tokens are read off by a probe (2511.08544, 2509.14252)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import (
    ahead,
    mean_over,
    plus_aux_loss,
    reaching,
    run_with_aux_loss,
    sigreg_loss,
    token_losses,
)
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.internal_sequence import tokens_of
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.norms import RMSNorm
from x_transformers.modules.unwrap import unwrapped
from x_transformers.next_latent_wrapper import check_state_net, checked_states_input, normalized_weights
from x_transformers.ops import at_least_float32

__getattr__ = names_of(__name__)


class Losses(NamedTuple):
    """Parts of the loss: of the next token, the later states with and without tokens, and the regularization."""

    ce: Tensor
    l2: Tensor
    l2_no_action: Tensor
    sigreg: Tensor


class Probe(nn.Sequential):
    """Head of three layers before another head: features to logits."""

    def __init__(self, dim: int, head: nn.Module, first: nn.Module | None) -> None:
        super().__init__(*([] if first is None else [first]), RMSNorm(dim), *_maps(dim, dim), head)


class LatentAutoregressive(SavesFolders):
    """Training of a decoder by the error of states that it predicts, in the space of its own features.

    Predictors roll out the later states from a hidden state, `z_r = P([z_{r - 1}; a(x[t + 1 + r])])` with embeddings a
    of the tokens read meanwhile ("actions"), or `z_r = Q(z_{r - 1})` without. The features E are the targets:

        l2 = sum over r of w_r * mean over t and features of (z_r[t] - E[t + 1 + r])^2
        loss = ce + (1 - lambda) * l2_loss_weight * l2 + lambda * sigreg(E)

    The regularization keeps the features normally distributed, so that they cannot all become equal. The loss of the
    next token trains a probe, through which the model then also generates; its gradient reaches the decoder only as
    far as `frac_gradient` says.

    Args:
        net: the decoder, whose `to_logits` is replaced by the probe followed by the old head.
        dim: width of the decoder.
        sigreg_loss_weight: lambda, in [0, 1].
        l2_loss_weight: weight of the errors.
        num_rollouts: number of later states that are predicted from each, at most one less than there are tokens.
        rollout_loss_weights: weights w of the rollouts, whose sum becomes 1; default equal ones.
        sigreg_loss_kwargs: keywords of `sigreg_loss`.
        frac_gradient: fraction of the gradient of the next token's loss that reaches the decoder, in [0, 1].
        predict_next_cosine_sim: predict directions: targets and predictions are normalized.
        predictor_input_hiddens_index: index of the self-attention whose input is where rollouts begin; None for the
            features.
        predict_next_embed_with_action, predict_next_embed_no_action: use the predictor with tokens, and the other one.
        detach_target: no gradient flows into the targets.
        ce_probe_module: first layer of the probe, `(..., dim)` to `(..., dim)`.
        ignore_index: label that does not count.
        pad_value: id that replaces `ignore_index` in the input.

    Raises:
        ConfigError: if the model has no such states, or an option is out of range or without effect.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        *,
        dim: int,
        sigreg_loss_weight: float = 0.05,
        l2_loss_weight: float = 1.0,
        num_rollouts: int = 1,
        rollout_loss_weights: Sequence[float] | None = None,
        sigreg_loss_kwargs: Mapping[str, Any] | None = None,
        frac_gradient: float = 0.0,
        predict_next_cosine_sim: bool = True,
        predictor_input_hiddens_index: int | None = -1,
        predict_next_embed_with_action: bool = True,
        predict_next_embed_no_action: bool = False,
        detach_target: bool = True,
        ce_probe_module: nn.Module | None = None,
        ignore_index: int = -100,
        pad_value: int = 0,
    ) -> None:
        super().__init__()
        model = check_state_net(net, dim)
        for name, value in (("sigreg_loss_weight", sigreg_loss_weight), ("frac_gradient", frac_gradient)):
            if not 0 <= value <= 1:
                raise ConfigError(f"`{name}` is {value}; it is a fraction and must lie in [0, 1].")
        if not (predict_next_embed_with_action or predict_next_embed_no_action):
            raise ConfigError("set `predict_next_embed_with_action` or `predict_next_embed_no_action`, or both.")
        if isinstance(model.to_logits, Probe):
            raise ConfigError("the head of `net` is a probe already; give a model that was not wrapped before.")
        _check_hidden(model, predictor_input_hiddens_index)
        self.net, self.dim, self.num_rollouts, self.hidden = net, dim, num_rollouts, predictor_input_hiddens_index
        self.sigreg_loss_weight, self.sigreg_loss_kwargs = sigreg_loss_weight, dict(sigreg_loss_kwargs or {})
        self.l2_loss_weight, self.frac_gradient = l2_loss_weight, frac_gradient
        self.rollout_weights = normalized_weights("rollout_loss_weights", rollout_loss_weights, num_rollouts)
        self.cosine, self.detach_target = predict_next_cosine_sim, detach_target
        self.ignore_index, self.pad_value = ignore_index, pad_value
        model.to_logits = Probe(dim, model.to_logits, ce_probe_module)  # type: ignore[arg-type]
        self.action_emb = self.to_next_embed_pred = self.to_next_embed_no_action_pred = None
        if predict_next_embed_with_action:
            self.action_emb = nn.Embedding(model.num_tokens, dim)
            self.to_next_embed_pred = nn.Sequential(RMSNorm(dim * 2), *_maps(dim * 2, dim))
        if predict_next_embed_no_action:
            self.to_next_embed_no_action_pred = nn.Sequential(RMSNorm(dim), *_maps(dim, dim))

    sigreg_loss = staticmethod(sigreg_loss)

    @checked
    @passes_on("net")
    def forward(self, x: Ids, return_loss_breakdown: bool = False, **kwargs: Any) -> Any:
        """Return the loss.

        Args:
            x: `(b, n)` ids, 3 or more; `ignore_index` where a token is neither shown nor predicted.
            return_loss_breakdown: also return the `Losses` that it is made of, before their weights.
            kwargs: of the model's pass.

        Returns:
            A scalar, or a pair of it and `Losses`.

        Raises:
            InputError: with what was given and what is needed.
        """
        model, x = unwrapped(self.net), checked_states_input(checked_ids(x, self), 1, kwargs)
        ids, labels = x.masked_fill(x == self.ignore_index, self.pad_value), x[:, 1:]
        valid = labels != self.ignore_index
        (features, record), aux = run_with_aux_loss(
            self.net,
            ids,
            return_embeddings_and_intermediates=True,
            excise_prepend_embeds=True,
            capture=Capture(memories=self.hidden is not None),
            **kwargs,
        )
        low = features if self.hidden is None else self._hidden_state(record, ids.shape[1], kwargs)
        probed = features.lerp(features.detach(), 1 - self.frac_gradient)[:, :-1]
        logits = model.logits_of(probed, kwargs.get("to_logits_kwargs"))
        each = token_losses(logits, labels, ignore_index=self.ignore_index, log_probs=model.output_is_log_prob)
        ce = mean_over(each, valid)
        l2, l2_no_action = self._rollouts(low[:, :-1], features, ids, valid)
        sigreg = torch.zeros_like(ce)
        if self.sigreg_loss_weight > 0:
            sigreg = sigreg_loss(features[:, :-1], valid=valid, **self.sigreg_loss_kwargs)
            if self.hidden is not None:
                sigreg = (sigreg + sigreg_loss(low[:, :-1], valid=valid, **self.sigreg_loss_kwargs)) / 2
        share = self.sigreg_loss_weight
        total = ce + (1 - share) * self.l2_loss_weight * (l2 + l2_no_action) + share * sigreg
        total = plus_aux_loss(total, aux)
        # without these three nothing has a gradient with respect to the upper layers
        features_learn = share > 0 or self.frac_gradient > 0 or not self.detach_target
        parts = (model.attn_pool, model.to_next_embed_pred) if features_learn else (model,)
        total = reaching(total, *parts, self.action_emb, self.to_next_embed_pred, self.to_next_embed_no_action_pred)
        return (total, Losses(ce, l2, l2_no_action, sigreg)) if return_loss_breakdown else total

    def _hidden_state(self, record: LayerIntermediates, n: int, kwargs: Mapping[str, Any]) -> Tensor:
        """Return `(b, n, d)` the stream at the chosen self-attention; of several, what it reads of them."""
        assert record.hiddens is not None and record.memory_inputs is not None and self.hidden is not None  # noqa: PT018
        state, read = record.hiddens[self.hidden], record.memory_inputs[self.hidden]
        if state.shape[0] != read.shape[-3]:  # streams are rows there
            state = read if read.ndim == 3 else read[0]
        prepended = kwargs.get("prepend_embeds")
        leading = 0 if prepended is None else prepended.shape[1]
        return tokens_of(state, unwrapped(self.net).layout, n, leading)

    def _rollouts(self, low: Tensor, features: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of both predictors; 0 for one that is not used.

        Args:
            low: `(b, n - 1, d)` where rollouts begin.
            features: `(b, n, d)`.
            ids: `(b, n)`.
            valid: `(b, n - 1)` bool, whether the next token counts.
        """
        count = min(self.num_rollouts, features.shape[1] - 1)
        targets = ahead(self._direction(features.detach() if self.detach_target else features), count)
        counts = ahead(F.pad(valid, (1, 0)), count)
        losses = [features.new_zeros((), dtype=torch.float32)] * 2
        if self.to_next_embed_pred is not None and self.action_emb is not None:
            # padding follows the last token
            after = ahead(F.pad(ids, (0, count), value=self.pad_value), count)[:, :, : low.shape[1]]
            state = low
            for r, action in enumerate(self.action_emb(after)):
                state = self.to_next_embed_pred(torch.cat((state, action), dim=-1))
                losses[0] = losses[0] + self.rollout_weights[r] * self._error(state, targets[r], counts[r])
        if self.to_next_embed_no_action_pred is not None:
            state = low
            for r in range(count):
                state = self.to_next_embed_no_action_pred(state)
                losses[1] = losses[1] + self.rollout_weights[r] * self._error(state, targets[r], counts[r])
        return losses[0], losses[1]

    def _direction(self, t: Tensor) -> Tensor:
        """Return `t / |t|` if directions are predicted, else t."""
        return F.normalize(t, dim=-1, eps=1e-6) if self.cosine else t

    def _error(self, state: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        squares = (at_least_float32(self._direction(state)) - at_least_float32(target)).square()
        return mean_over(squares.mean(dim=-1), counts)


def _maps(width: int, out: int) -> tuple[nn.Module, ...]:
    """Build three linear maps with LeakyReLU between, from `width` to `out`; the inner width is `2 * out`."""
    inner = out * 2
    return (
        nn.Linear(width, inner),
        nn.LeakyReLU(),
        nn.Linear(inner, inner),
        nn.LeakyReLU(),
        nn.Linear(inner, out),
    )


def _check_hidden(model: TransformerWrapper, index: int | None) -> None:
    if index is None:
        return
    count = model.attn_layers.sequence.count("a", model.attn_layers.sequence.order)
    if not -count <= index < count:
        raise ConfigError(
            f"`predictor_input_hiddens_index` is {index}; the model has {count} self-attentions, so it must be between "
            f"{-count} and {count - 1}, or None for the features."
        )
