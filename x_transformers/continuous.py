"""Training and sampling of vectors, each from the previous ones (2112.05329)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.decoding.generation_inputs import check_seq_len, cut_arguments
from x_transformers.decoding.loop import in_shape, make_reader, streamed
from x_transformers.decoding.options import GenerationOptions, takes_options
from x_transformers.decoding.prompts import Prompts, align_right
from x_transformers.decoding.sampling import is_greedy
from x_transformers.decoding.step import Reader, Sequences
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_counts, checked, read_mask
from x_transformers.forward_pass.arrays import Vectors, as_vectors
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_aux_loss, mean_over, plus_aux_loss, run_with_aux_loss
from x_transformers.models.continuous import ContinuousTransformerWrapper
from x_transformers.models.next_item import check_hides_future, check_predicts
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32, finite_where_hidden
from x_transformers.options.values import shown

__getattr__ = names_of(__name__)

__all__ = [
    "ContinuousAutoregressiveWrapper",
    "ContinuousTransformerWrapper",
    "GaussianNLL",
    "sample_from_mean_variance",
]


class GaussianNLL(nn.Module):
    """Negative log-likelihood `(ln v + (y - mu)^2 / v) / 2`, without its constant; v is at least 1e-6."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each element.

        Args:
            pred: `(2, ...)` means mu and variances v.
            target: `(...)` values y.

        Returns:
            `(...)`.
        """
        mean, variance = pred
        variance = variance.clamp(min=1e-6)
        return (variance.log() + (target - mean).square() / variance) / 2


def sample_from_mean_variance(mean: Tensor, variance: Tensor, eps: float = 1e-5, temperature: float = 1.0) -> Tensor:
    """Draw `mean + sqrt(max(variance, eps)) * temperature * noise`, with standard normal noise.

    Args:
        mean, variance: of the same shape.
        eps: least variance.
        temperature: factor of the noise.
    """
    return mean + variance.clamp(min=eps).sqrt() * temperature * torch.randn_like(mean)


class ContinuousAutoregressiveWrapper(SavesFolders):
    """Training of a model to predict the next vector, and generation by repeated prediction.

    Args:
        net: the model.
        loss_fn: function of predictions and targets that returns the loss of each element; default the negative
            log-likelihood of a Gaussian for probabilistic models, otherwise the squared error.
        use_l1_loss: use the absolute error instead of the squared one.
        equal_loss_weight_batch: all rows have the same weight, whatever their lengths: the loss is the mean over rows
            of the sum over features of the mean over the valid positions of a row.

    Raises:
        ConfigError: if the model does not return an output for each position, or two losses are requested.
    """

    def __init__(
        self,
        net: ContinuousTransformerWrapper,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        use_l1_loss: bool = False,
        equal_loss_weight_batch: bool = False,
    ) -> None:
        super().__init__()
        model = unwrapped(net)
        if not isinstance(model, ContinuousTransformerWrapper):
            raise ConfigError(f"`net` is a {type(net).__name__}; it must be a ContinuousTransformerWrapper.")
        if model.average_pool_embed:
            raise ConfigError("`net` returns the mean over positions (`average_pool_embed`); build it without.")
        if use_l1_loss and (loss_fn is not None or model.probabilistic):
            other = "`loss_fn`" if loss_fn is not None else "a probabilistic `net`"
            raise ConfigError(f"`use_l1_loss` and {other} are two losses; choose one.")
        self.net, self.equal_loss_weight_batch = net, equal_loss_weight_batch
        if loss_fn is None:
            loss_fn = GaussianNLL() if model.probabilistic else _absolute_error if use_l1_loss else _squared_error
        self.loss_fn = loss_fn

    @property
    def max_seq_len(self) -> int:
        """Length of the model's position table; 0 for no limit."""
        return unwrapped(self.net).max_seq_len

    @property
    def probabilistic(self) -> bool:
        """True if the model predicts a mean and a variance."""
        return unwrapped(self.net).probabilistic

    # training

    @checked
    @passes_on("net")
    def forward(self, x: Tensor, rollout_steps: int = 1, **kwargs: Any) -> Tensor:
        """Return the mean over valid positions and features of `loss_fn(net(x[..t]), x[t + 1])`.

        Args:
            x: `(b, n, D)`.
            rollout_steps: more than 1: see `forward_rollout`.
            kwargs: of the model's pass. `lens (b,)`, `mask (b, n)` or `seq_start_pos` specify the valid positions; a
                target counts if it and the position before it are valid. Arguments over positions cover all n of them,
                or all but the last one.

        Returns:
            A scalar; zero, attached to the graph, if there is no valid target.

        Raises:
            InputError: with what was given and what is needed.
        """
        if rollout_steps != 1:
            return self.forward_rollout(x, rollout_steps, **kwargs)
        _check(x, kwargs)
        check_predicts(x)
        check_hides_future(self.net, kwargs)
        n, counted = x.shape[1], _counted(x, kwargs)
        x = _finite(x, kwargs)
        if kwargs.get("lens") is not None:
            kwargs = {**kwargs, "lens": None, "mask": _before(kwargs["lens"], x)}
        predicted, aux = run_with_aux_loss(self.net, x[:, :-1], **cut_arguments(kwargs, 0, n - 1, n))
        return plus_aux_loss(self._mean(self._losses(predicted, x[:, 1:]), counted), aux)

    @checked
    @passes_on("net")
    def forward_rollout(self, x: Tensor, rollout_steps: int = 2, **kwargs: Any) -> Tensor:
        """Return the loss of the model's own continuations: each row is cut at random and continued by `rollout_steps`.

        Predictions are appended (probabilistic ones as reparameterised samples), and gradients flow through them.

        Args:
            x: `(b, n, D)`.
            rollout_steps: number R of vectors that are predicted. Rows of at most R vectors do not count.
            kwargs: `lens (b,)` or `mask (b, n)`, and arguments of the model's passes that are not over positions. Where
                the mask is False, a position stays hidden, whether it is given or predicted, and a target counts if it
                and the position before it are valid.

        Returns:
            A scalar, the mean over rows, steps and features; zero, attached to the graph, if no row is long enough.

        Raises:
            InputError: with what was given and what is needed.
        """
        if rollout_steps < 1:
            raise InputError(f"`rollout_steps` is {rollout_steps}; it must be a whole number, at least 1.")
        _check(x, kwargs)
        check_predicts(x, rollout_steps + 1)
        for name in ("self_attn_kv_mask", "pos", "sum_embeds", "seq_start_pos", "attn_mask", "attn_bias"):
            if kwargs.get(name) is not None:
                raise InputError(
                    f"`{name}` covers positions, which roll-outs move; pass the valid ones as `lens` or `mask`, or set "
                    "`rollout_steps = 1`."
                )
        lens, mask = kwargs.pop("lens", None), kwargs.pop("mask", None)
        if mask is not None:
            mask, lens = _checked_mask(mask, x, lens)
        if lens is None:
            lens = torch.full((len(x),), x.shape[1], device=x.device)
        else:
            x = x.masked_fill(~_before(lens, x).unsqueeze(-1), 0.0)
        counted = (lens > rollout_steps).unsqueeze(-1).expand(-1, rollout_steps)
        # random histories, so that the model learns to continue any length; aligned, so that all rows go on at one
        # column
        cut = _cut_points(lens - rollout_steps)
        history, start = _aligned(x, cut)
        places = (cut.unsqueeze(-1) + torch.arange(rollout_steps, device=x.device)).clamp(max=x.shape[1] - 1)
        targets = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if mask is not None:
            counted = counted & mask.gather(1, places) & mask.gather(1, places - 1)
            mask = torch.cat((align_right(mask, cut, False)[:, -history.shape[1] :], mask.gather(1, places)), dim=1)
        predicted, aux = self._roll_out(history, start, mask, rollout_steps, kwargs)
        return plus_aux_loss(mean_over(self._losses(predicted, targets).mean(dim=-1), counted), aux)

    def _roll_out(
        self, history: Tensor, start: Tensor, mask: Tensor | None, steps: int, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return `steps` predictions, `([2,] b, steps, D)`, and the mean of the auxiliary losses of their passes.

        The mask covers histories and predictions.
        """
        predictions: list[Tensor] = []
        losses: list[Tensor | None] = []
        cache: Any = KVCache() if unwrapped(self.net).can_cache_kv else None
        new, width = history, history.shape[1]
        for step in range(steps):
            if mask is not None:
                kwargs = {**kwargs, "mask": mask[:, : width + step]}
            if cache is None:
                out, aux = run_with_aux_loss(self.net, history, seq_start_pos=start, **kwargs)
            else:
                (out, cache), aux = run_with_aux_loss(
                    self.net,
                    new,
                    seq_start_pos=start,
                    cache=cache,
                    input_not_include_cache=True,
                    return_intermediates=True,
                    **kwargs,
                )
            losses.append(aux)
            predictions.append(out[..., -1:, :])
            new = predictions[-1]
            if self.probabilistic:
                mean, variance = new
                # reparameterized: gradients of later steps flow through the draw into earlier ones
                new = mean + variance.sqrt() * torch.randn_like(mean)
            new = new.to(history.dtype)
            history = torch.cat((history, new), dim=1) if cache is None else history
        return torch.cat(predictions, dim=-2), mean_aux_loss(losses)

    def _losses(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each element, `(b, n, D)`."""
        if predicted.shape[-1] != targets.shape[-1]:
            raise ShapeError(
                f"the model returns vectors of width {predicted.shape[-1]} and x has {targets.shape[-1]}; predicting "
                "the next one needs `dim_out` to be `dim_in`."
            )
        losses = self.loss_fn(at_least_float32(predicted), at_least_float32(targets))
        if losses.shape != targets.shape:
            raise ShapeError(
                f"`loss_fn` returns a tensor of shape {tuple(losses.shape)}; it must return a loss for each element, "
                f"{tuple(targets.shape)} (`reduction = 'none'`)."
            )
        return losses

    def _mean(self, losses: Tensor, counted: Tensor | None) -> Tensor:
        """Return the mean over the positions that count; see the class."""
        if counted is None:
            counted = torch.ones(losses.shape[:2], dtype=torch.bool, device=losses.device)
        if not self.equal_loss_weight_batch:
            return mean_over(losses.mean(dim=-1), counted)
        kept = losses.sum(dim=-1).masked_fill(~counted, 0.0)
        return (kept.sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)).mean()

    # generation

    @takes_options("temperature cache_kv * prompt_lens restrict_to_max_seq_len")
    @passes_on("net")
    def generate(self, start_tokens: Vectors, seq_len: int, options: GenerationOptions) -> Tensor:
        """Continue each prompt by `seq_len` vectors, in evaluation mode.

        Args:
            start_tokens: `(b, n, D)` or `(n, D)`.
            seq_len: number of vectors to generate.
            temperature: factor of the noise of a probabilistic model; 0 returns the mean.
            cache_kv: cache keys and values. False runs the whole sequence at each step.
            prompt_lens: `(b,)` length of the prompt of each row, which starts on the left.
            restrict_to_max_seq_len: the model sees only its last `max_seq_len` vectors; a cache drops older ones.
                Models with absolute positions do not use a cache if the sequence becomes longer than that.
            kwargs: of the model's passes. `mask` covers the prompts; `pos` and `sum_embeds` cover prompts and
                generated vectors.

        Returns:
            The new vectors, `(b, seq_len, D)` or `(seq_len, D)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        steps, read, view = self._begin(start_tokens, seq_len, options)
        with torch.inference_mode(), view:
            new = list(steps())
        # outside of inference mode, so that training may use the vectors
        vectors = torch.cat([read.tokens[:, :0], *new], dim=1)
        return vectors.reshape(*read.lead, seq_len, vectors.shape[-1])

    @takes_options("temperature cache_kv * prompt_lens restrict_to_max_seq_len")
    @passes_on("net")
    def stream(self, start_tokens: Vectors, seq_len: int, options: GenerationOptions) -> Iterator[Tensor]:
        """Yield the vectors of `generate`, `(b, D)` or `(D,)` each.

        The model is in evaluation mode until the last one.

        Args:
            start_tokens, seq_len, temperature, cache_kv, prompt_lens, restrict_to_max_seq_len, kwargs: as in
                `generate`.

        Raises:
            InputError: immediately, with what was given and what is needed; but for the width of a custom
                `project_out`, which is only known with the first vector.
        """
        steps, read, view = self._begin(start_tokens, seq_len, options)
        return streamed(steps, in_shape((*read.lead, read.tokens.shape[-1])), view)

    def _begin(
        self, start_tokens: Vectors, seq_len: int, options: GenerationOptions
    ) -> tuple[Callable[[], Iterator[Tensor]], Prompts, InferenceView]:
        """Check all arguments; return a function that yields the vectors, the prompts, and the modules that run."""
        check_seq_len(seq_len)
        if "cache" in options.arguments:
            raise InputError("`cache` cannot be chosen here; vectors are generated with a dynamic cache (`cache_kv`).")
        if "lens" in options.arguments:
            raise InputError("`lens` cannot be passed to generation; pass `prompt_lens`.")
        read = self._read(as_vectors(start_tokens, self, "`start_tokens`"), options.prompt_lens)
        net, total = unwrapped(self.net), read.tokens.shape[1] + max(seq_len, 1) - 1
        if 0 < net.max_seq_len < total and not net.can_cache_kv_outside_max_seq_len:
            options = replace(options, cache_kv=False)
        view = InferenceView(net)
        reader = make_reader(view.of(net), read, seq_len, options)
        steps = partial(self._steps, reader, Sequences(read.tokens, read.start), seq_len, options.temperature)
        return steps, read, view

    def _steps(self, reader: Reader, sequences: Sequences, count: int, temperature: float) -> Iterator[Tensor]:
        """Append and yield `count` vectors, `(b, 1, D)` each."""
        first = sequences.parts[0]
        for _ in range(count):
            new = reader.read(sequences)[..., -1:, :]
            if self.probabilistic:
                mean, variance = new
                new = (
                    mean
                    if is_greedy(temperature)
                    else sample_from_mean_variance(mean, variance, temperature=temperature)
                )
            _check_width(new.shape[-1], first.shape[-1])
            new = new.to(first.dtype)
            sequences.append(new)
            yield new

    def _read(self, start: Tensor, prompt_lens: Tensor | Sequence[int] | None) -> Prompts:
        """Check the prompts, and align them on the right."""
        if start.ndim not in (2, 3) or not start.is_floating_point() or start.shape[-2] == 0 or len(start) == 0:
            raise ShapeError(
                f"`start_tokens` has shape {tuple(start.shape)} and dtype {start.dtype}; it must be floating, "
                "(b, n, D) or (n, D), with at least one vector."
            )
        net = unwrapped(self.net)
        if net.dim_in not in (None, start.shape[-1]):
            raise ShapeError(
                f"`start_tokens` has shape {tuple(start.shape)}; the model reads vectors of width {net.dim_in}."
            )
        if net.dim_out is not None:
            _check_width(net.dim_out, start.shape[-1])
        lead = tuple(start.shape[:-2])
        vectors = start.reshape(-1, *start.shape[-2:])
        width = vectors.shape[1]
        if prompt_lens is None:
            return Prompts(vectors, None, None, width, lead)
        try:
            lens = torch.as_tensor(prompt_lens, device=start.device).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"`prompt_lens` is {shown(prompt_lens)}; it must hold a length for each row.") from error
        if lens.shape != (len(vectors),) or bool(((lens < 1) | (lens > width)).any()):
            raise InputError(
                f"`prompt_lens` holds {lens.tolist()}; it must hold {len(vectors)} lengths from 1 to {width}."
            )
        aligned, padding = _aligned(vectors, lens)
        return Prompts(aligned, padding, lens, width, lead)


def _check_width(given: int, read: int) -> None:
    """Raise an `InputError` unless the model can read the vectors that it returns."""
    if given != read:
        raise InputError(
            f"the model returns vectors of width {given} and reads vectors of width {read}, so it cannot read what it "
            "generates. Make `dim_out` and `dim_in` agree."
        )


def _squared_error(predicted: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(predicted, targets, reduction="none")


def _absolute_error(predicted: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(predicted, targets, reduction="none")


def _cut_points(room: Tensor) -> Tensor:
    """Draw `(b,)` lengths of histories, from 1 to `room`; 1 where there is no room."""
    most = room.clamp(min=1)
    # rounding may make the product as large as `most`
    return torch.minimum(1 + (torch.rand(len(room), device=room.device) * most).long(), most)


def _aligned(x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Align the first `lens` vectors of each row on the right; return them with `(b,)` the left padding.

    Columns that are padding in every row are removed.
    """
    most = int(lens.max()) if len(lens) else 0
    return align_right(x, lens)[:, x.shape[1] - most :], most - lens


def _before(lens: Tensor, x: Tensor) -> Tensor:
    """Return `(b, n)` bool, the first `lens` positions of each row."""
    if not isinstance(lens, Tensor):
        raise InputError(f"`lens` is {shown(lens)}; it must hold {len(x)} whole numbers.")
    check_counts(lens, "lens", x.shape[1], len(x))
    return torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(-1)


def _checked_mask(mask: Tensor, x: Tensor, lens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `(b, n)` bool, and `(b,)` the number of positions up to the last valid one."""
    if lens is not None:
        raise InputError("`mask` and `lens` both specify the valid positions; pass one of them.")
    mask = read_mask(mask, "mask")
    if mask.ndim != 2 or mask.shape[0] not in (1, len(x)) or mask.shape[1] != x.shape[1]:
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:2])}.")
    mask = mask.expand(len(x), -1)
    return mask, (mask * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(dim=-1)


def _finite(x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return x with 0 instead of NaN and infinity where it is padding: such targets would have gradients of NaN."""
    mask, lens, start = (kwargs.get(name) for name in ("mask", "lens", "seq_start_pos"))
    if lens is not None:
        x = finite_where_hidden(x, _before(lens, x))
    if start is not None:
        x = finite_where_hidden(x, torch.arange(x.shape[1], device=x.device) >= start.unsqueeze(-1))
    if mask is not None and mask.shape[-1] == x.shape[1]:
        x = finite_where_hidden(x, read_mask(mask, "mask"))
    return x


def _counted(x: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return `(b, n - 1)` bool, the targets that count, or None for all."""
    batch, n = x.shape[:2]
    valid = torch.ones(batch, n, dtype=torch.bool, device=x.device)
    mask, lens, start = (kwargs.get(name) for name in ("mask", "lens", "seq_start_pos"))
    if mask is not None and lens is not None:
        raise InputError("`mask` and `lens` both specify the valid positions; pass one of them.")
    if mask is None and lens is None and start is None:
        return None
    if lens is not None:
        valid = _before(lens, x)
    if start is not None:
        check_counts(start, "seq_start_pos", n, batch)
        valid = valid & (torch.arange(n, device=x.device) >= start.unsqueeze(-1))
    counted = valid[:, :-1] & valid[:, 1:]
    if mask is None:
        return counted
    mask = read_mask(mask, "mask")
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (n, n - 1):
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be ({batch}, {n}).")
    # a mask of length n - 1 covers the inputs, and does not know whether the last target is valid
    return counted & (mask[:, :-1] & mask[:, 1:] if mask.shape[1] == n else mask)


def _check(x: Tensor, kwargs: Mapping[str, Any]) -> None:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be (batch, positions, width), with one at least.")
    for name in kwargs:
        if name.startswith("return_") or name in ("cache", "prepend_embeds", "prepend_mask"):
            raise InputError(f"`{name}` cannot be passed to the loss; call the net itself.")
