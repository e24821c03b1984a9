"""Training of a decoder together with a model of how its states develop (2511.05963)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.loop import check_next_token_net
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids
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
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.frozen import FrozenUse
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import at_least

__getattr__ = names_of(__name__)


class Losses(NamedTuple):
    """Parts of the loss: of the next token, the next states, the tokens that these predict, and the regularization."""

    ce: Tensor
    next_latent: Tensor
    kl: Tensor
    sigreg: Tensor


def MLP(dim_in: int, dim_out: int, dim_hidden: int, depth: int = 3) -> nn.Sequential:  # noqa: N802
    """Build `depth` linear maps with GELU between them."""
    widths = [dim_in, *[dim_hidden] * (depth - 1), dim_out]
    maps = [nn.Linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*[part for each in maps[:-1] for part in (each, nn.GELU())], maps[-1])


class ResidualDynamics(LoadsWhole):
    """States by steps of a network: `s_r = s_{r - 1} + net([s_{r - 1}; e_r])`.

    Args:
        net: `(..., 2 d)` to `(..., d)`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, rollout_next_token_embeds: Tensor, curr_latent: Tensor) -> Tensor:
        """Return the states after each of the next tokens.

        Args:
            rollout_next_token_embeds: `(R, b, n, d)` embeddings e of the next tokens.
            curr_latent: `(b, n, d)` states before them.

        Returns:
            `(R, b, n, d)`.
        """
        states = []
        for embeds in rollout_next_token_embeds:
            curr_latent = curr_latent + self.net(torch.cat((curr_latent, embeds), dim=-1))
            states.append(curr_latent)
        return torch.stack(states)


class RolloutGRU(LoadsWhole):
    """States of a gated recurrent unit that reads the next tokens (1406.1078).

    Args:
        dim: width of states and embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, rollout_next_token_embeds: Tensor, curr_latent: Tensor) -> Tensor:
        """Return the states after each of the next tokens, as `ResidualDynamics` does."""
        inputs = rollout_next_token_embeds.flatten(1, -2).transpose(0, 1)
        states, _ = self.gru(inputs, curr_latent.flatten(0, -2).unsqueeze(0).contiguous())
        return states.transpose(0, 1).reshape(rollout_next_token_embeds.shape)


class MSECosineSimLoss(LoadsWhole):
    """Squared error mixed with the distance of directions: `(1 - w) (s - h)^2 + w (1 - cos(s, h))` (2606.30534).

    Args:
        weight: w.
    """

    def __init__(self, weight: float = 0.9) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each feature, `(..., d)` like the two given."""
        distance = 1 - F.cosine_similarity(pred, target, dim=-1).unsqueeze(-1)
        return (1 - self.weight) * (pred - target).square() + self.weight * distance


class _Elementwise(nn.Module):
    """A loss of PyTorch without reduction."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return getattr(F, self.name)(pred, target, reduction="none")


LOSSES = {
    "smooth_l1": lambda: _Elementwise("smooth_l1_loss"),
    "mse": lambda: _Elementwise("mse_loss"),
    "mse_and_cosine_sim": MSECosineSimLoss,
}
DYNAMICS = ("residual", "gru", "custom")


class NextLatentWrapper(SavesFolders):
    """Training of a decoder to predict the next token, and of its states to predict the next states.

    With the states h of the decoder and embeddings e of tokens, a model of the dynamics predicts `s_r` for `h[t + 1 +
    r]`, from `h[t]` and `e[t + 1] ... e[t + 1 + r]`. The loss is that of the next token, plus weighted

        next states: sum over r of mean over t of w_r a_r |s_r - h[t + 1 + r]|
        tokens: sum over r of mean over t of w_r a_r KL(p(h[t + 1 + r]) | p(s_r)),    p = softmax of the head

    with targets as constants, and the head too. `a_r = exp(-decay * sum over k < r of the error of s_k)` lets
    rollouts that go wrong count less.

    Args:
        net: the decoder.
        dim: width of the decoder and of its embeddings.
        num_rollouts: number R of states that are predicted from each.
        loss_type: "smooth_l1", "mse", "mse_and_cosine_sim", or a module of `(R, b, n, d)` predictions and targets that
            returns the loss of each feature.
        dynamics_type: "residual" for a network that adds to the state, "gru" for a recurrent one, or "custom".
        dynamics_network: the module of a "custom" one, see `ResidualDynamics.forward`.
        dynamics_hidden_dim: inner width of the residual network; default `dim`.
        dynamics_num_layers: number of its linear maps.
        next_latent_loss_weight, kl_loss_weight: weights of the two losses.
        ignore_index: label that does not count.
        pad_value: id that replaces `ignore_index` in the input.
        rollout_weights: weights w of the rollouts, whose sum becomes 1; default equal ones.
        sigreg_loss_weight: weight of `sigreg_loss` of the states.
        sigreg_loss_kwargs: keywords of `sigreg_loss`.
        dynamic_rollout_loss_weight: use a; else it is 1.
        dynamic_loss_decay: decay of a.

    Raises:
        ConfigError: if the model has no such states, or an option is out of range or without effect.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        *,
        dim: int,
        num_rollouts: int = 1,
        loss_type: str | nn.Module = "smooth_l1",
        dynamics_type: str = "residual",
        dynamics_network: nn.Module | None = None,
        dynamics_hidden_dim: int | None = None,
        dynamics_num_layers: int = 3,
        next_latent_loss_weight: float = 1.0,
        kl_loss_weight: float = 1.0,
        ignore_index: int = -100,
        pad_value: int = 0,
        rollout_weights: Sequence[float] | None = None,
        sigreg_loss_weight: float = 0.0,
        sigreg_loss_kwargs: Mapping[str, Any] | None = None,
        dynamic_rollout_loss_weight: bool = True,
        dynamic_loss_decay: float = 1.0,
    ) -> None:
        super().__init__()
        at_least(1, dynamics_hidden_dim=dynamics_hidden_dim)
        model = check_state_net(net, dim)
        if dynamics_num_layers < 1:
            raise ConfigError(f"`dynamics_num_layers` is {dynamics_num_layers}; the network has at least one map.")
        if dynamics_type not in DYNAMICS:
            raise ConfigError(f"`dynamics_type` is {dynamics_type!r}; it must be {' or '.join(map(repr, DYNAMICS))}.")
        if (dynamics_network is not None) != (dynamics_type == "custom"):
            raise ConfigError(
                f"`dynamics_network` and `dynamics_type = 'custom'` belong together; the type is {dynamics_type!r}, "
                f"and a network is {'given' if dynamics_network is not None else 'missing'}."
            )
        if dynamics_type != "residual" and (dynamics_hidden_dim is not None or dynamics_num_layers != 3):
            raise ConfigError(
                "`dynamics_hidden_dim` and `dynamics_num_layers` are of the residual network; drop them, or set "
                "`dynamics_type = 'residual'`."
            )
        if isinstance(loss_type, str) and loss_type not in LOSSES:
            raise ConfigError(
                f"`loss_type` is {loss_type!r}; it must be a module, or {' or '.join(map(repr, LOSSES))}."
            )
        self.net, self.dim, self.num_rollouts = net, dim, num_rollouts
        self.token_emb = model.token_emb
        self.loss_fn = LOSSES[loss_type]() if isinstance(loss_type, str) else loss_type
        self.dynamics_model = _dynamics(
            dynamics_type, dynamics_network, dim, dynamics_hidden_dim or dim, dynamics_num_layers
        )
        self.next_latent_loss_weight, self.kl_loss_weight = next_latent_loss_weight, kl_loss_weight
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.sigreg_loss_weight, self.sigreg_loss_kwargs = sigreg_loss_weight, dict(sigreg_loss_kwargs or {})
        self.rollout_weights = normalized_weights("rollout_weights", rollout_weights, num_rollouts)
        self.dynamic_loss_decay = dynamic_loss_decay if dynamic_rollout_loss_weight else 0.0
        self._frozen_logits = FrozenUse(model, "logits_of", ("to_logits", "logit_changes", "mixture", "token_emb"))

    sigreg_loss = staticmethod(sigreg_loss)

    @checked
    @passes_on("net")
    def forward(self, x: Ids, return_loss_breakdown: bool = False, **kwargs: Any) -> Any:
        """Return the loss.

        Args:
            x: `(b, n)` ids, n larger than `num_rollouts + 1`; `ignore_index` where a token is neither shown nor
                predicted.
            return_loss_breakdown: also return the `Losses` that it is made of, before their weights.
            kwargs: of the model's pass.

        Returns:
            A scalar, or a pair of it and `Losses`.

        Raises:
            InputError: with what was given and what is needed.
        """
        model = unwrapped(self.net)
        x = checked_states_input(checked_ids(x, self), self.num_rollouts, kwargs)
        shown = x.masked_fill(x == self.ignore_index, self.pad_value)
        h, aux = run_with_aux_loss(self.net, shown, return_embeddings=True, excise_prepend_embeds=True, **kwargs)
        logits, labels = model.logits_of(h[:, :-1], kwargs.get("to_logits_kwargs")), x[:, 1:]
        valid = labels != self.ignore_index
        each = token_losses(logits, labels, ignore_index=self.ignore_index, log_probs=model.output_is_log_prob)
        ce = mean_over(each, valid)
        next_latent, kl = self._rollouts(h, self.token_emb(shown), valid)
        total = ce + next_latent * self.next_latent_loss_weight + kl * self.kl_loss_weight
        total = plus_aux_loss(total, aux)
        sigreg = torch.zeros_like(total)
        if self.sigreg_loss_weight > 0:
            sigreg = sigreg_loss(h[:, :-1], valid=valid, **self.sigreg_loss_kwargs)
            total = total + sigreg * self.sigreg_loss_weight
        total = reaching(total, model.attn_pool, model.to_next_embed_pred, model.exit_norms, self.dynamics_model)
        return (total, Losses(ce, next_latent, kl, sigreg)) if return_loss_breakdown else total

    def _rollouts(self, h: Tensor, embeds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the next states, and that of the tokens that they predict.

        Args:
            h: `(b, n, d)` states.
            embeds: `(b, n, d)` of the tokens.
            valid: `(b, n - 1)` bool, whether the next token counts.
        """
        count = self.num_rollouts
        targets, counts = ahead(h, count).detach(), ahead(F.pad(valid, (1, 0)), count)
        states = self.dynamics_model(ahead(embeds, count).detach(), h[:, :-1])
        errors = at_least_float32(self.loss_fn(states, targets)).mean(dim=-1)
        next_latent = kl = errors.new_zeros(())
        # what the earlier states of a rollout were wrong by
        wrong = torch.zeros_like(errors[0])
        for r, weight in enumerate(self.rollout_weights):
            weights = weight * (-self.dynamic_loss_decay * wrong).exp()
            next_latent = next_latent + mean_over(weights * errors[r], counts[r])
            if self.kl_loss_weight > 0:
                kl = kl + mean_over(weights * self._divergence(targets[r], states[r]), counts[r])
            wrong = wrong + errors[r].detach()
        return next_latent, kl

    def _divergence(self, target: Tensor, state: Tensor) -> Tensor:
        """Return `KL(p(target) | p(state))` of the tokens that states predict: `(b, n - 1)`."""
        wanted, got = (at_least_float32(self._frozen_logits(each)).log_softmax(dim=-1) for each in (target, state))
        return F.kl_div(got, wanted.detach(), reduction="none", log_target=True).sum(dim=-1)


def normalized_weights(name: str, weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return `count` weights whose sum is 1.

    Raises:
        ConfigError: if there are not as many, or no sum to divide by.
    """
    if count < 1:
        raise ConfigError(f"`num_rollouts` is {count}; at least one later state is predicted.")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or min(given) < 0 or sum(given) <= 0:
        raise ConfigError(f"`{name}` is {given}; it must hold {count} numbers, none below 0 and not all 0.")
    return tuple(weight / sum(given) for weight in given)


def check_state_net(net: Any, dim: int) -> TransformerWrapper:
    """Return the decoder without what is around it, if its states and its embeddings have one width.

    Raises:
        ConfigError: if it is no causal decoder of this width, with one head.
    """
    model = check_next_token_net(net)
    if not model.attn_layers.causal:
        raise ConfigError("`net` sees the tokens that it should predict; its stack must be causal (a Decoder).")
    if model.attn_layers.dim != dim or model.emb_dim != dim:
        raise ConfigError(
            f"`dim` is {dim}; the model has width {model.attn_layers.dim} and embeddings of width {model.emb_dim}, and "
            "all three must be equal, since states are predicted from states and embeddings."
        )
    return model


def checked_states_input(x: Tensor, rollouts: int, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the ids in 64 bits, which hold any `ignore_index`.

    Raises:
        InputError: if there are not enough of them, or arguments would change what a pass returns.
    """
    x = x.long()
    if x.shape[1] <= rollouts + 1:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; {rollouts} later states are predicted from each (`num_rollouts`), so give "
            f"at least {rollouts + 2} tokens."
        )
    for name in kwargs:
        if name.startswith("return_") or name in ("cache", "capture", "logits_to_keep", "excise_prepend_embeds"):
            raise InputError(f"`{name}` cannot be given to the loss; call the net itself.")
    return x


def _dynamics(kind: str, given: nn.Module | None, dim: int, hidden: int, layers: int) -> nn.Module:
    if given is not None:
        return given
    if kind == "gru":
        return RolloutGRU(dim)
    maps = MLP(dim * 2, dim, hidden, layers)
    # the state does not change at first
    nn.init.zeros_(maps[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(maps[-1].bias)  # type: ignore[arg-type]
    return ResidualDynamics(nn.Sequential(nn.LayerNorm(dim * 2), maps))
