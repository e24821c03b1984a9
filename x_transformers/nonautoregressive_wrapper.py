"""Training and sampling of all tokens in parallel, from masked ones (mask-predict, 1904.09324; MaskGIT, 2202.04200).

At time t in [0, 1) a fraction `m(t)` of the tokens is masked, where m is the schedule, and the model predicts them.
The loss of a row may be multiplied by `-m'(t) / m(t)`, as in masked diffusion (2406.07524). Self-conditioning is from
2208.04202, the token critic from 2209.04439.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.watch import Watch
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_over, plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32, log
from x_transformers.options.suggestions import did_you_mean

__getattr__ = names_of(__name__)

Schedule = Callable[[Tensor], Tensor]


class Losses(NamedTuple):
    """Loss to minimize, and its parts.

    Attributes:
        loss: scalar to minimize.
        generator_loss: mean over masked tokens, or None if only the critic is trained.
        critic_loss: of the critic, or None without one.
    """

    loss: Tensor
    generator_loss: Tensor | None
    critic_loss: Tensor | None


def linear_schedule(t: Tensor) -> Tensor:
    """Return the masked fraction `1 - t`."""
    return 1 - t


def cosine_schedule(t: Tensor) -> Tensor:
    """Return the masked fraction `cos(pi t / 2)`."""
    return torch.cos(t * (math.pi / 2))


SCHEDULES: dict[str, Schedule] = {"linear": linear_schedule, "cosine": cosine_schedule}


def remove_fraction(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keep the `ceil((1 - thres) * v)` largest logits of the last axis, and set the others to -inf.

    Args:
        logits: `(..., v)`.
        thres: fraction of the logits that is removed.

    Raises:
        InputError: if nothing would be kept.
    """
    count = math.ceil((1 - thres) * logits.shape[-1])
    if not 1 <= count <= logits.shape[-1]:
        raise InputError(f"`thres` is {thres}; it is the fraction of tokens that is removed and must lie in [0, 1).")
    values, indices = logits.topk(count, dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, indices, values)


def clamped_gumbel_noise(t: Tensor) -> Tensor:
    """Draw `-ln(-ln(u))` with `u` uniform in (0, 1), of the shape of t."""
    return -log(-log(torch.rand_like(t), 1e-10), 1e-10)


def sample_along(t: Tensor, temperature: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    """Draw from `softmax(t / temperature)` over an axis.

    Args:
        t: logits.
        temperature: a number, or a tensor that broadcasts against t.
        dim: the axis.

    Returns:
        Indices, without the axis.
    """
    t = at_least_float32(t)  # half precision would overflow when divided by a low temperature
    scale = temperature.clamp(min=1e-10) if isinstance(temperature, Tensor) else max(temperature, 1e-10)
    return (t / scale + clamped_gumbel_noise(t)).argmax(dim=dim)


# the names of the reference library in this module; those in `autoregressive_wrapper` are other functions
top_k, gumbel_noise, gumbel_sample = remove_fraction, clamped_gumbel_noise, sample_along


def get_mask_subset_prob(mask: Tensor, prob: float | Tensor, min_mask: int = 0) -> Tensor:
    """Draw a random part of a mask: in each row a fraction `prob` of its members, at least `min_mask`.

    Args:
        mask: `(b, n)` bool.
        prob: the fraction, a number or `(b,)`.
        min_mask: least number of members, if the row has them.

    Returns:
        `(b, n)` bool.
    """
    count = (mask.sum(dim=-1) * prob).clamp(min=min_mask)
    drawn = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, math.inf)
    return (drawn.argsort(dim=-1).argsort(dim=-1) < count.unsqueeze(-1)) & mask


class SelfCritic(nn.Module):
    """Critic that rates tokens by the features of the model itself, with a linear head.

    Args:
        net: the model.
    """

    def __init__(self, net: TransformerWrapper) -> None:
        super().__init__()
        self.net = net
        self.to_logits = nn.Linear(unwrapped(net).attn_layers.dim, 1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return `(b, n, 1)` logits that each of the tokens `x (b, n)` is wrong."""
        return self.to_logits(self.net(x, return_embeddings=True, **kwargs))


class NonAutoregressiveWrapper(SavesFolders):
    """Training of a model to predict masked tokens, and generation that fills in the most certain ones first.

    Args:
        net: the model, over sequences of `max_seq_len` tokens; a bidirectional one sees all of them.
        mask_id: the id of a masked token.
        steps: number of steps of generation.
        self_cond: the model also reads the features of its last prediction (2208.04202).
        self_cond_train_prob: probability of this in training; otherwise it reads a learned vector.
        no_replace_prob: fraction of the tokens to predict that are shown unchanged, in half of the batches.
        random_token_prob: fraction that is replaced by a random token, in half of the batches.
        schedule: "linear", "cosine", or a function of a tensor t that falls from 1 to 0.
        can_mask_prev_unmasked: generation may mask tokens again that it has filled in.
        token_critic: a model with one output for each token, which detects wrong tokens (2209.04439).
        self_token_critic: the model itself detects them, with a head for it.
        critic_loss_weight: factor of the critic's loss.
        use_simple_mdlm_loss_weight: multiply a row's loss by `-m'(t) / m(t)` (2406.07524).

    Raises:
        ConfigError: if the model does not return logits for each token, or an option is out of range or without effect.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        *,
        mask_id: int,
        steps: int = 18,
        self_cond: bool = False,
        self_cond_train_prob: float = 0.75,
        no_replace_prob: float = 0.15,
        random_token_prob: float = 0.1,
        schedule: str | Schedule = "linear",
        can_mask_prev_unmasked: bool = False,
        token_critic: nn.Module | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        use_simple_mdlm_loss_weight: bool = True,
    ) -> None:
        super().__init__()
        model = _check_net(net)
        if not 0 <= mask_id < model.num_tokens:
            raise ConfigError(f"`mask_id` is {mask_id}; the vocabulary runs from 0 to {model.num_tokens - 1}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"`steps` is {steps!r}; it must be a whole number, at least 1.")
        _check_probabilities(
            self_cond_train_prob=self_cond_train_prob,
            no_replace_prob=no_replace_prob,
            random_token_prob=random_token_prob,
        )
        if token_critic is not None and self_token_critic:
            raise ConfigError("`token_critic` and `self_token_critic` are two critics; choose one.")
        self.net = net
        self.mask_id, self.steps = mask_id, steps
        self.self_cond, self.self_cond_train_prob = self_cond, self_cond_train_prob
        self.no_replace_prob, self.random_token_prob = no_replace_prob, random_token_prob
        self.schedule = _find_schedule(schedule)
        self.can_mask_prev_unmasked = can_mask_prev_unmasked
        self.critic_loss_weight = critic_loss_weight
        self.use_simple_mdlm_loss_weight = use_simple_mdlm_loss_weight
        dim = model.attn_layers.dim
        self.null_embed = nn.Parameter(torch.randn(dim)) if self_cond else None
        self.to_self_cond = nn.Linear(dim, model.emb_dim, bias=False) if self_cond else None
        self.token_critic = SelfCritic(net) if self_token_critic else token_critic

    @property
    def dim(self) -> int:
        """Width of the model's features."""
        return self.net.attn_layers.dim

    @property
    def max_seq_len(self) -> int:
        """Number of tokens of the model's inputs."""
        return self.net.max_seq_len

    @property
    def num_tokens(self) -> int:
        """Size of the model's vocabulary."""
        return self.net.num_tokens

    # training

    @checked
    @passes_on("net")
    def forward(
        self,
        x: Ids,
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        **kwargs: Any,
    ) -> Losses:
        """Return the loss `mean over masked tokens of w(t_b) * -log p(x)`, and that of the critic.

        The critic learns, by binary cross entropy, which of the tokens that the model fills in differ from x.

        Args:
            x: `(b, max_seq_len)` ids.
            only_train_generator: leave out the critic, which gets no gradient.
            only_train_critic: train only the critic; the model gets no gradient. DistributedDataParallel needs
                `find_unused_parameters = True` for steps with either of the two.
            generator_sample_temperature: temperature of the tokens that the critic rates; default random in [0, 1).
            kwargs: of the passes of the model and the critic. Where `mask` is False, nothing is predicted.

        Returns:
            The total loss and its parts, scalars.

        Raises:
            InputError: with what was given and what is needed.
        """
        x = checked_ids(x, self).long()
        valid = self._check(x, only_train_generator, only_train_critic, kwargs)
        t = torch.rand(len(x), device=x.device)
        masked = self._draw_masked(x, t, valid)
        shown = self._show(x, masked)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_train_critic):
            logits, aux = run_with_aux_loss(self.net, shown, **self._training_condition(shown, kwargs), **kwargs)
        critic_loss = None
        if self.token_critic is not None and not only_train_generator:
            sampled = self._sample(logits.detach(), generator_sample_temperature)
            # a draw may be the true token by chance, which the critic should find right
            filled = torch.where(masked, sampled, x)
            critic_loss = self._critic_loss(filled, filled != x, valid, kwargs, frozen=only_train_critic)
            if only_train_critic:
                return Losses(critic_loss, None, critic_loss)
        # what the loss does not read, such as the learned vector where the model has read its own features
        loss = plus_aux_loss(self._generator_loss(logits, x, masked, t), aux)
        net = unwrapped(self.net)
        loss = reaching(loss, self.null_embed, net.to_next_embed_pred, net.exit_norms)
        if critic_loss is None:
            return Losses(loss, loss, None)
        return Losses(loss + critic_loss * self.critic_loss_weight, loss, critic_loss)

    def _check(self, x: Tensor, only_generator: bool, only_critic: bool, kwargs: dict[str, Any]) -> Tensor:
        """Check the arguments, and return `(b, n)` bool, where there are tokens."""
        length = unwrapped(self.net).max_seq_len
        if x.shape[1] != length:
            raise ShapeError(f"x has {x.shape[1]} tokens; it must have `max_seq_len` = {length}.")
        if only_generator and only_critic:
            raise InputError("`only_train_generator` and `only_train_critic` leave nothing to train; choose one.")
        if only_critic and self.token_critic is None:
            raise InputError("`only_train_critic` needs a critic; build with `token_critic` or `self_token_critic`.")
        _check_kwargs(kwargs, self.self_cond)
        mask = kwargs.get("mask")
        if mask is None:
            return torch.ones(x.shape, dtype=torch.bool, device=x.device)
        if mask.shape != x.shape:
            raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be that of x, {tuple(x.shape)}.")
        return mask.bool()

    def _draw_masked(self, x: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        """Draw `(b, n)` bool: a random fraction `m(t)` of the tokens of each row, at least one."""
        return get_mask_subset_prob(valid, self.schedule(t), min_mask=1)

    def _show(self, x: Tensor, masked: Tensor) -> Tensor:
        """Return the input of the model: most masked tokens as `mask_id`, some unchanged, some random."""
        replaced = masked
        fraction: float | Tensor = self.random_token_prob
        # One coin for the whole batch decides on each of the two changes, so that some batches show only `mask_id`, as
        # all inputs of generation do.
        if self.no_replace_prob > 0:
            coin = torch.rand((), device=x.device) < 0.5
            replaced = replaced & ~(get_mask_subset_prob(masked, self.no_replace_prob) & coin)
            fraction = torch.where(coin, fraction * (1 - self.no_replace_prob), fraction)
        if self.random_token_prob > 0:
            coin = torch.rand((), device=x.device) < 0.5
            swapped = get_mask_subset_prob(replaced, fraction) & coin
            x = torch.where(swapped, torch.randint_like(x, unwrapped(self.net).num_tokens), x)
            replaced = replaced & ~swapped
        return x.masked_fill(replaced, self.mask_id)

    def _training_condition(self, shown: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the argument of self-conditioning, in training."""
        if self.to_self_cond is None or float(torch.rand(())) >= self.self_cond_train_prob:
            return self._self_condition(shown)
        with torch.no_grad():
            features = self.net(shown, return_embeddings=True, **self._self_condition(shown), **kwargs)
        return self._self_condition(shown, features)

    def _self_condition(self, tokens: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return the argument that carries features of an earlier prediction, or a learned vector if there are none.

        It is added to the embeddings of the tokens. Without self-conditioning there is no argument.
        """
        if self.to_self_cond is None or self.null_embed is None:
            return {}
        features = self.null_embed.expand(*tokens.shape, -1) if features is None else features
        return {"sum_embeds": self.to_self_cond(features)}

    def _generator_loss(self, logits: Tensor, x: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        normalized = unwrapped(self.net).output_is_log_prob
        each = token_losses(logits, x.masked_fill(~masked, -100), log_probs=normalized)
        if self.use_simple_mdlm_loss_weight:
            each = at_least_float32(each) * self._loss_weight(t).unsqueeze(-1)
        return mean_over(each, masked)

    def _loss_weight(self, t: Tensor) -> Tensor:
        """Return `-m'(t) / m(t)` for `t (b,)`, by automatic differentiation."""
        # a schedule may be any function, and its slope is needed even if the loss is computed without gradients
        with torch.inference_mode(False):
            t = t.detach().clone()
            slope = torch.func.grad(lambda t: self.schedule(t).sum())(t)
            fraction = self.schedule(t)
        return -slope / fraction.clamp(min=torch.finfo(t.dtype).tiny)

    def _sample(self, logits: Tensor, temperature: float | None) -> Tensor:
        drawn = torch.rand((), device=logits.device) if temperature is None else temperature
        return gumbel_sample(at_least_float32(logits), drawn)

    def _critic_loss(
        self, filled: Tensor, wrong: Tensor, valid: Tensor, kwargs: dict[str, Any], *, frozen: bool
    ) -> Tensor:
        rated, aux = self._rate(filled, kwargs, frozen=frozen)
        each = F.binary_cross_entropy_with_logits(rated, wrong.to(rated.dtype), reduction="none")
        return plus_aux_loss(mean_over(each, valid), aux)

    def _rate(self, filled: Tensor, kwargs: dict[str, Any], *, frozen: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return `(b, n)` logits of the critic that a token is wrong, and its auxiliary loss, if it has one.

        `frozen` stops gradients into the model.
        """
        critic = self.token_critic
        assert critic is not None
        if isinstance(critic, SelfCritic):
            condition = self._self_condition(filled)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                features, aux = run_with_aux_loss(critic.net, filled, return_embeddings=True, **condition, **kwargs)
            rated = critic.to_logits(features)
        else:
            rated, aux = run_with_aux_loss(critic, filled, **kwargs)
        rated = rated.squeeze(-1) if rated.ndim == 3 else rated
        if rated.shape != filled.shape:
            raise ShapeError(
                f"the critic returns a tensor of shape {tuple(rated.shape)}; it must return one number for each token, "
                f"{tuple(filled.shape)}. Build it with `logits_dim = 1`."
            )
        return at_least_float32(rated), aux

    # generation

    @torch.no_grad()
    @checked
    @passes_on("net")
    def generate(
        self,
        batch_size: int | None = None,
        start_temperature: float = 1.0,
        filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """Generate sequences, in evaluation mode.

        Each step fills in all masked tokens, and masks the least certain ones again. After step i of S a fraction
        `m(i / S)` of the tokens stays masked, and none after the last one.

        Args:
            batch_size: number of rows; None for a single one without batch axis.
            start_temperature: of the first step; it falls linearly to 0.
            filter_thres: fraction of the vocabulary that is never drawn; None for no filter.
            noise_level_scale: scale of the Gumbel noise on the critic's logits, which falls linearly too.
            kwargs: of the passes of the model and the critic.

        Returns:
            `(batch_size, max_seq_len)` ids, or `(max_seq_len,)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        _check_generation(batch_size, start_temperature, filter_thres)
        _check_kwargs(kwargs, self.self_cond)
        view = InferenceView(self)
        with view:
            tokens = view.of(self)._fill(batch_size or 1, start_temperature, filter_thres, noise_level_scale, kwargs)
        return tokens if batch_size is not None else tokens[0]

    def _fill(
        self,
        batch: int,
        start_temperature: float,
        filter_thres: float | None,
        noise_level: float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Generate `(batch, max_seq_len)` tokens; see `generate`."""
        device, n = next(self.net.parameters()).device, unwrapped(self.net).max_seq_len
        tokens = torch.full((batch, n), self.mask_id, device=device)
        masked = torch.ones(batch, n, dtype=torch.bool, device=device)
        features, watch = None, Watch()
        for step, count in enumerate(self._counts(n), start=1):
            left = (self.steps - step) / self.steps
            logits, features = self._predict(tokens, features, kwargs)
            if filter_thres is not None:
                logits = remove_fraction(logits, filter_thres)
            watch.note(logits)
            sampled = sample_along(logits, start_temperature * left)
            tokens = torch.where(masked, sampled, tokens)
            if count > 0:
                doubts = self._doubts(tokens, logits, noise_level * left, kwargs)
                if self.token_critic is not None:
                    watch.note(doubts, "the critic")
                if not self.can_mask_prev_unmasked:
                    # tokens of earlier steps are final; the schedule falls, so that at least `count` of the others are
                    # left
                    doubts = doubts.masked_fill(~masked, -math.inf)
                least_sure = doubts.topk(count, dim=-1).indices
                masked = torch.zeros_like(masked).scatter(-1, least_sure, True)
                tokens = tokens.masked_fill(masked, self.mask_id)
            else:
                masked = torch.zeros_like(masked)
        watch.look()
        return tokens

    def _counts(self, n: int) -> list[int]:
        """Return the number of tokens that stay masked after each step; 0 after the last one."""
        fractions = self.schedule(torch.linspace(0, 1, self.steps + 1))[1:-1]
        return [*(min(max(int(count), 0), n) for count in (fractions * n).floor().tolist()), 0]

    def _predict(self, tokens: Tensor, features: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return logits `(b, n, v)`, -inf for `mask_id`, and features, given the last features."""
        condition = self._self_condition(tokens, features)
        logits, features = self.net(tokens, return_logits_and_embeddings=True, **condition, **kwargs)
        banned = torch.arange(logits.shape[-1], device=logits.device) == self.mask_id
        return at_least_float32(logits).masked_fill(banned, -math.inf), features

    def _doubts(self, tokens: Tensor, logits: Tensor, noise_level: float, kwargs: dict[str, Any]) -> Tensor:
        """Return `(b, n)` scores; the larger, the sooner a token is masked again."""
        if self.token_critic is not None:
            rated, _ = self._rate(tokens, kwargs)
            return rated + clamped_gumbel_noise(rated) * noise_level
        return 1 - logits.softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _check_net(net: Any) -> TransformerWrapper:
    net = unwrapped(net)
    if not isinstance(net, TransformerWrapper):
        raise ConfigError(f"`net` is a {type(net).__name__}; it must be a TransformerWrapper around a stack.")
    if net.to_logits is None or net.has_multiple_heads or net.pools or net.returns_pooled:
        raise ConfigError("`net` must return logits for each token: build it with one head, and without pooling.")
    if net.max_seq_len < 1:
        raise ConfigError(
            f"`max_seq_len` of `net` is {net.max_seq_len}; it is the length of all sequences, at least 1."
        )
    return net


def _check_probabilities(**given: float) -> None:
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"`{name}` is {value}; it is a probability and must lie in [0, 1].")


def _find_schedule(given: str | Schedule) -> Schedule:
    """Return the schedule, which must fall from at most 1 to at least 0.

    Raises:
        ConfigError: if the name is unknown, or the schedule does not fall.
    """
    if isinstance(given, str) and given not in SCHEDULES:
        raise ConfigError(
            f"`schedule` is {given!r}; it must be a function of t or one of {', '.join(SCHEDULES)}."
            f"{did_you_mean(given, SCHEDULES)}"
        )
    schedule = SCHEDULES[given] if isinstance(given, str) else given
    if not callable(schedule):
        raise ConfigError(f"`schedule` is {given!r}; it must be a function of t or one of {', '.join(SCHEDULES)}.")
    times = torch.linspace(0, 1, 101, device="cpu")
    try:
        fractions = schedule(times)
    except Exception as error:
        raise ConfigError(f"`schedule` raised {type(error).__name__} for 101 times from 0 to 1: {error}") from error
    if not isinstance(fractions, Tensor) or fractions.shape != times.shape:
        raise ConfigError("`schedule` must return a tensor of the shape of the times t that it is given.")
    if not (fractions.diff() < 0).all() or fractions.max() > 1 + 1e-6 or fractions.min() < -1e-6:
        raise ConfigError(
            "`schedule` must return the masked fraction at time t, which falls from at most 1 at t = 0 to at least 0 "
            f"at t = 1; this one goes from {float(fractions[0]):.3g} to {float(fractions[-1]):.3g}, between "
            f"{float(fractions.min()):.3g} and {float(fractions.max()):.3g}."
        )
    return schedule


def _check_kwargs(kwargs: dict[str, Any], self_cond: bool) -> None:
    for name in kwargs:
        if name.startswith("return_") or name in ("cache", "prepend_embeds"):
            raise InputError(f"`{name}` cannot be given here; call the net itself.")
        if name == "sum_embeds" and self_cond:
            raise InputError("`sum_embeds` carries self-conditioning; drop it, or build without `self_cond`.")


def _check_generation(batch_size: int | None, temperature: float, filter_thres: float | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; it must be at least 1, or None for a single row.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"`start_temperature` is {temperature}; it must be finite and not negative.")
    if filter_thres is not None and not 0 <= filter_thres < 1:
        raise InputError(f"`filter_thres` is {filter_thres}; it must lie in [0, 1), or be None for no filter.")
