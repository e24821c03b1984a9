"""Training and sampling of tokens and numbers, where one token represents numbers (2310.02989)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.generation_inputs import check_seq_len, cut_arguments
from x_transformers.decoding.loop import make_reader, streamed
from x_transformers.decoding.options import GenerationOptions, takes_options
from x_transformers.decoding.prompts import Prompts, read_prompts
from x_transformers.decoding.sampling import Choose, check_readable
from x_transformers.decoding.step import Reader, Sequences
from x_transformers.decoding.watch import Watch
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked, read_mask
from x_transformers.forward_pass.arrays import Ids, Vectors, as_prompts, as_vectors
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_over, plus_aux_loss, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.next_item import check_hides_future, check_predicts
from x_transformers.models.xval import XValTransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32

__getattr__ = names_of(__name__)

__all__ = ["GenerateReturn", "LossBreakdown", "XValAutoregressiveWrapper", "XValTransformerWrapper"]


class LossBreakdown(NamedTuple):
    """Losses of each target.

    Attributes:
        cross_entropy_loss: `(b, n - 1)` of tokens.
        numerical_mse_loss: `(b, n - 1)` of numbers, 0 where the target is not a number.
    """

    cross_entropy_loss: Tensor
    numerical_mse_loss: Tensor


class GenerateReturn(NamedTuple):
    """Generated tokens and numbers.

    Attributes:
        sampled_token_ids: `(..., m)` ids.
        sampled_numbers: `(..., m)` numbers, NaN where the token is not the numeric one.
        is_number_mask: `(..., m)` bool, True where it is.
    """

    sampled_token_ids: Tensor
    sampled_numbers: Tensor
    is_number_mask: Tensor


class XValAutoregressiveWrapper(SavesFolders):
    """Training of a model to predict the next token and its number, and generation by repeated prediction.

    Args:
        net: the model.
        ignore_index: label that does not count in the loss.
        pad_value: id that replaces `ignore_index` in the input, and pads shorter prompts.
        numerical_loss_weight: factor of the squared error of numbers, not negative.

    Raises:
        ConfigError: if the model is another one, or the weight is negative.
    """

    def __init__(
        self,
        net: XValTransformerWrapper,
        ignore_index: int = -100,
        pad_value: int = 0,
        numerical_loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(unwrapped(net), XValTransformerWrapper):
            raise ConfigError(f"`net` is a {type(net).__name__}; it must be an XValTransformerWrapper.")
        if numerical_loss_weight < 0:
            raise ConfigError(f"`numerical_loss_weight` is {numerical_loss_weight}; it must not be negative.")
        self.net = net
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.numerical_loss_weight = numerical_loss_weight

    @property
    def max_seq_len(self) -> int:
        """Length of the model's position table; 0 for no limit."""
        return unwrapped(self.net).max_seq_len

    @checked
    @passes_on("net", but=("x_num",))
    def forward(self, x: Ids, x_num: Tensor, return_loss_breakdown: bool = False, **kwargs: Any) -> Any:
        """Return the mean over valid targets of `-log p(x[t + 1]) + w * [is numeric] * (number[t] - x_num[t + 1])^2`.

        Args:
            x: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            x_num: `(b, n)` numbers, read only where x is the numeric token.
            return_loss_breakdown: also return the `LossBreakdown`.
            kwargs: of the model's pass. A `mask (b, n)` also selects the targets that count; one of length n - 1 covers
                both inputs and targets. Arguments over tokens cover all n of them, or all but the last one.

        Returns:
            A scalar; zero, attached to the graph, if there is no valid target. With the breakdown, both.

        Raises:
            InputError: with what was given and what is needed.
        """
        x = checked_ids(x, self).long()
        _check(x, x_num, kwargs)
        check_predicts(x)
        check_hides_future(self.net, kwargs)
        n = x.shape[1]
        ignored = x == self.ignore_index
        shown, numbers = x.masked_fill(ignored, self.pad_value), x_num.masked_fill(ignored, 0.0)
        arguments = cut_arguments(kwargs, 0, n - 1, n)
        (logits, predicted), aux = run_with_aux_loss(self.net, shown[:, :-1], numbers[:, :-1], **arguments)
        prepended = kwargs.get("prepend_embeds")
        p = 0 if prepended is None else prepended.shape[1]
        counted = _counted(x, kwargs) & ~ignored[:, 1:]
        labels = x[:, 1:].masked_fill(~counted, self.ignore_index)
        breakdown = LossBreakdown(
            token_losses(logits[:, p:], labels, ignore_index=self.ignore_index),
            self._number_losses(predicted[:, p:], x_num[:, 1:], labels == unwrapped(self.net).numerical_token_id),
        )
        loss = mean_over(breakdown[0] + self.numerical_loss_weight * breakdown[1], counted)
        loss = plus_aux_loss(loss, aux)
        return (loss, breakdown) if return_loss_breakdown else loss

    def _number_losses(self, predicted: Tensor, target: Tensor, numeric: Tensor) -> Tensor:
        """Return `(b, n - 1)` squared errors, 0 where the target is not a number."""
        # Elsewhere `target` may hold anything, even NaN. The prediction itself takes its place, so that both the error
        # and its gradient are 0; a mask after the subtraction would leave NaN in the gradient.
        target = torch.where(numeric, target.to(predicted.dtype), predicted.detach())
        return F.mse_loss(at_least_float32(predicted), at_least_float32(target), reduction="none")

    @takes_options("filter_logits_fn filter_kwargs temperature * prompt_lens cache_kv filter_before_temperature")
    @passes_on("net", but=("x_num",))
    def generate(
        self,
        start_tokens: Ids,
        start_numbers: Vectors,
        seq_len: int,
        options: GenerationOptions,
    ) -> GenerateReturn:
        """Continue each prompt by `seq_len` tokens and numbers, in evaluation mode.

        Of sequences longer than `max_seq_len` the model sees the last tokens, and does not use a cache.

        Args:
            start_tokens: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            start_numbers: the numbers, of the same shapes.
            seq_len: number of tokens to generate.
            [options]
            kwargs: of the model's passes. `mask` covers the prompts; `pos` covers prompts and generated tokens.

        Returns:
            The new tokens and numbers, `(..., seq_len)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        numbered, read, view = self._begin(start_tokens, start_numbers, seq_len, options)
        with torch.inference_mode(), view:
            for _ in numbered.run(seq_len):
                pass
        width = read.tokens.shape[1]
        return self._shown((numbered.ids.tokens()[:, width:], numbered.numbers.tokens()[:, width:]), read.lead, seq_len)

    @takes_options("filter_logits_fn filter_kwargs temperature * prompt_lens cache_kv filter_before_temperature")
    @passes_on("net", but=("x_num",))
    def stream(
        self,
        start_tokens: Ids,
        start_numbers: Vectors,
        seq_len: int,
        options: GenerationOptions,
    ) -> Iterator[GenerateReturn]:
        """Yield the tokens and numbers of `generate`, `(...)` each; the model is in evaluation mode until the last one.

        Args:
            start_tokens, start_numbers, seq_len: as in `generate`.
            [options]
            kwargs: of the model's passes, as in `generate`.

        Raises:
            InputError: immediately, with what was given and what is needed.
        """
        numbered, read, view = self._begin(start_tokens, start_numbers, seq_len, options)
        return streamed(partial(numbered.run, seq_len), lambda pair: self._shown(pair, read.lead), view)

    def _begin(
        self,
        start_tokens: Ids,
        start_numbers: Vectors,
        seq_len: int,
        options: GenerationOptions,
    ) -> tuple[_Numbered, Prompts, InferenceView]:
        """Check all arguments; return the batch that is continued, the prompts, and the modules that run."""
        net = unwrapped(self.net)
        check_seq_len(seq_len)
        prepended = options.arguments.get("prepend_embeds") is not None
        tokens = as_prompts(start_tokens, net, "`start_tokens`")
        read = read_prompts(tokens, options.prompt_lens, self.pad_value, net.num_tokens, may_be_empty=prepended)
        numbers = Sequences(read.align(_rows(tokens, _numbers(start_numbers, tokens, net), read.width), 0.0))
        # a window over the last tokens moves their positions, and cached keys have the old ones
        if 0 < net.max_seq_len < read.tokens.shape[1] + seq_len - 1:
            options = replace(options, cache_kv=False)
        view = InferenceView(net)
        reader = make_reader(
            view.of(net),
            read,
            seq_len,
            options,
            growing=lambda first, last, others: {"x_num": numbers.tokens()[:, first:last]},
        )
        return (
            _Numbered(Sequences(read.tokens, read.start), numbers, reader, options.choose, net.num_tokens),
            read,
            view,
        )

    def _shown(self, pair: tuple[Tensor, Tensor], lead: tuple[int, ...], *count: int) -> GenerateReturn:
        """Return tokens and numbers `(b, m)` of inference mode as ordinary tensors `(*lead, *count)`."""
        ids, numbers = (t.clone().reshape((*lead, *count)) for t in pair)
        numeric = ids == unwrapped(self.net).numerical_token_id
        return GenerateReturn(ids, numbers.masked_fill(~numeric, math.nan), numeric)


class _Numbered:
    """Batch of tokens and their numbers that is being continued.

    Args:
        ids, numbers: tokens and numbers so far.
        reader: of the model.
        choose: map from logits `(b, v)` to tokens `(b, 1)`.
        vocabulary: number of ids that the model can read.
    """

    def __init__(self, ids: Sequences, numbers: Sequences, reader: Reader, choose: Choose, vocabulary: int) -> None:
        self.ids, self.numbers, self.reader = ids, numbers, reader
        self.choose, self.vocabulary, self.watch = choose, vocabulary, Watch()

    def run(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Append and yield `count` tokens and numbers, `(b, 1)` each."""
        for _ in range(count):
            logits, predicted = self.reader.read(self.ids)
            check_readable(logits, self.vocabulary)
            self.watch.note(logits[:, -1])
            token, number = self.choose(logits[:, -1]), predicted[:, -1:].to(self.numbers.parts[0].dtype)
            self.ids.append(token)
            # every token gets a number, which the model ignores unless it is the numeric token
            self.numbers.append(number)
            yield token, number
        self.watch.look()


def _numbers(numbers: Vectors, tokens: Tensor | list[Tensor], net: nn.Module) -> Tensor | list[Tensor]:
    """Return numbers in the form that the tokens have, a tensor or a list of them."""
    if isinstance(tokens, Tensor) or not isinstance(numbers, list | tuple):
        return as_vectors(numbers, net, "`start_numbers`")
    return [as_vectors(each, net, "`start_numbers`") for each in numbers]


def _rows(tokens: Tensor | Sequence[Tensor], numbers: Tensor | Sequence[Tensor], width: int) -> Tensor:
    """Return `(b, width)` numbers, aligned on the left as the prompts were given."""
    pairs = [(tokens, numbers)] if isinstance(tokens, Tensor) else list(zip(tokens, numbers, strict=False))
    for one, other in pairs:
        if not isinstance(other, Tensor) or one.shape != other.shape or len(tokens) != len(numbers):
            raise ShapeError("`start_numbers` must have the shapes of `start_tokens`: a number for each token.")
        if not other.is_floating_point():
            raise InputError(f"`start_numbers` has dtype {other.dtype}; it must be a floating-point type.")
    if isinstance(numbers, Tensor):
        return numbers.reshape(-1, width)
    return torch.nn.utils.rnn.pad_sequence(list(numbers), batch_first=True)


def _counted(x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return `(b, n - 1)` bool, the targets that count."""
    batch, n = x.shape
    counted = torch.ones(batch, n - 1, dtype=torch.bool, device=x.device)
    start, mask = kwargs.get("seq_start_pos"), kwargs.get("mask")
    if start is not None:
        counted = torch.arange(n - 1, device=x.device) >= start.unsqueeze(-1)
    if mask is None:
        return counted
    return counted & (mask[:, 1:] if mask.shape[1] == n else mask).bool()


def _check(x: Tensor, x_num: Tensor, kwargs: dict[str, Any]) -> None:
    if x.shape[1] == 0 or x_num.shape != x.shape:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and `x_num` {tuple(x_num.shape)}; they must be equal, with at least one "
            "token."
        )
    if x_num.is_complex():
        raise InputError(f"`x_num` has dtype {x_num.dtype}; the numbers must be real.")
    mask = kwargs.get("mask")
    if mask is not None:
        kwargs["mask"] = mask = read_mask(mask, "mask")
    if mask is not None and (mask.ndim != 2 or mask.shape[1] not in (x.shape[1], x.shape[1] - 1)):
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be {tuple(x.shape)}.")
    for name in kwargs:
        if name.startswith("return_") or name == "cache":
            raise InputError(f"`{name}` cannot be passed to the loss; call the net itself.")
