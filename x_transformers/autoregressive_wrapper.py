"""Next-token training and generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.caches import modify_cached_kv
from x_transformers.decoding.compiled import CompiledReading, CompiledStep, compiled_prefill
from x_transformers.decoding.filters import FILTER_LOGITS_FN, contrastive_decode_fn, min_p, top_a, top_k, top_p
from x_transformers.decoding.generation import Generation, begin, search
from x_transformers.decoding.generation_inputs import check_length_and_end
from x_transformers.decoding.loop import check_next_token_net, in_shape, streamed, with_progress
from x_transformers.decoding.options import GenerationOptions, takes_options
from x_transformers.decoding.prompts import Prompts, align_right, pad_at_dim, read_prompts
from x_transformers.decoding.sampling import gumbel_noise, gumbel_sample, unchanged
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_prompts
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_over, plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.chunked_loss import chunked_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.exit_losses import ExitLosses, ExitWeights, exit_losses
from x_transformers.models.exits import up_to_exit
from x_transformers.models.next_item import check_hides_future, check_predicts
from x_transformers.models.repeated import looped_loss
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules import script_names
from x_transformers.modules.inference import InferenceView, eval_decorator
from x_transformers.modules.script_names import *  # noqa: F403
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32, log, values_can_be_read
from x_transformers.options.values import shown

__all__ = [
    "FILTER_LOGITS_FN",
    "AutoregressiveWrapper",
    "align_right",
    "contrastive_decode_fn",
    "eval_decorator",
    "gumbel_noise",
    "gumbel_sample",
    "log",
    "min_p",
    "modify_cached_kv",
    "pad_at_dim",
    "top_a",
    "top_k",
    "top_p",
]
__all__ += script_names.__all__


class AutoregressiveWrapper(SavesFolders):
    """Training of a model to predict the next token, and generation from it.

    Args:
        net: the model.
        ignore_index: label that does not count in the loss.
        pad_value: id that replaces `ignore_index` in the input, and fills shorter prompts and rows that have ended.
        mask_prob: fraction of the keys that is hidden in the loss pass (2210.13432), in [0, 1).
        add_attn_z_loss: add the z-loss of attention; its weight is the model's `attn_z_loss_weight`.
        next_embed_loss_weight: weight of the error of the next token's embedding, which a model with
            `add_continuous_pred_head` predicts too.
        loss_chunk_size: number of tokens for which the loss is computed at a time, so that the logits of a large
            vocabulary are never in memory together; None for all at once. The head then runs twice in training.
        looped_loss_threshold_exit: improvement that a further loop of a looped model should bring.
        looped_loss_slope: how sharply its gates distinguish improvements.
        looped_exit_loss_weight: weight of the loss of the gates; see `looped_loss`.
        exit_loss_weights: weights of the losses of a model with `exit_layers`, normalized to a sum of 1: after block e
            "equal" is 1, "linear" e and "sum" e (e + 1) / 2; or a number for each exit and for the end of the model.
        exit_loss_scale: factor of the weights of all exits but the end.
        exit_loss_every: number of steps in which each exit takes part once; exit i, counted from 0, does so if
            `(i + exit_step) % exit_loss_every == 0`. The end always takes part.

    Raises:
        ConfigError: if the model has several heads or none, or an option is out of range or without effect.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        ignore_index: int = -100,
        pad_value: int = 0,
        mask_prob: float = 0.0,
        add_attn_z_loss: bool = False,
        next_embed_loss_weight: float = 0.1,
        looped_loss_threshold_exit: float = 0.05,
        looped_loss_slope: float = 50,
        looped_exit_loss_weight: float = 1.0,
        *,
        loss_chunk_size: int | None = None,
        exit_loss_weights: ExitWeights = "sum",
        exit_loss_scale: float = 1.0,
        exit_loss_every: int = 1,
    ) -> None:
        super().__init__()
        model = check_next_token_net(net)
        if not 0 <= mask_prob < 1:
            raise ConfigError(f"`mask_prob` is {mask_prob}; it is the fraction of hidden keys and must lie in [0, 1).")
        if loss_chunk_size is not None:
            _check_chunks(model, loss_chunk_size)
        _refuse_without_head(
            "`add_continuous_pred_head`",
            model.add_continuous_pred_head,
            next_embed_loss_weight=(next_embed_loss_weight, 0.1),
        )
        _refuse_without_head(
            "`looped`",
            model.looped,
            looped_loss_threshold_exit=(looped_loss_threshold_exit, 0.05),
            looped_loss_slope=(looped_loss_slope, 50),
            looped_exit_loss_weight=(looped_exit_loss_weight, 1.0),
        )
        self.net, self.exit_losses = net, ExitLosses.of(model, exit_loss_weights, exit_loss_scale, exit_loss_every)
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.mask_prob, self.add_attn_z_loss = mask_prob, add_attn_z_loss
        self.next_embed_loss_weight = next_embed_loss_weight if model.add_continuous_pred_head else 0.0
        self.loss_chunk_size = loss_chunk_size
        self.looped_options = looped_loss_threshold_exit, looped_loss_slope, looped_exit_loss_weight
        self._compiled: dict[Any, CompiledReading] = {}

    def __getstate__(self) -> dict[str, Any]:
        # compiled steps belong to this object and this process
        return {**self.__dict__, "_compiled": {}}

    @property
    def max_seq_len(self) -> int:
        """Length of the model's table of positions."""
        return unwrapped(self.net).max_seq_len

    # training

    @checked
    @passes_on("net")
    def forward(
        self,
        x: Ids,
        return_outputs: bool = False,
        prepend_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        exit_step: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the mean over all valid targets of `-log p(x[t + 1] | x[..t])`.

        A model that predicts embeddings adds the mean of `|pred[t] - embedding[t + 1]|` over the same places and all
        features, times its weight. In training, the loss of a model with exits is the weighted mean over these; in
        evaluation, that of the end of the model.

        Args:
            x: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            return_outputs: also return `(logits, intermediates)`, logits `(b, n - 1, v)`.
            prepend_embeds: `(b, p, E)` embeddings before the tokens; nothing is predicted at their places.
            lens: `(b,)` number of valid tokens of each row, from the left.
            exit_step: number of the training step, for `exit_loss_every`.
            kwargs: of the model's pass.

        Returns:
            A scalar; zero, attached to the graph, if there is no valid target.

        Raises:
            InputError: with what was given and what is needed.
        """
        x = _checked_loss_input(checked_ids(x, self), lens, kwargs)
        check_hides_future(self.net, kwargs)
        chunked = self.loss_chunk_size is not None
        if chunked and return_outputs:
            raise InputError(
                "`return_outputs` returns the logits of all tokens, which `loss_chunk_size` keeps out of memory; call "
                "the net itself for them, or build the wrapper without `loss_chunk_size`."
            )
        kwargs.pop("excise_prepend_embeds", None)  # they are cut off here
        if lens is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lens.long().unsqueeze(-1)
            x = x.masked_fill(padding, self.ignore_index)
        shown = x.masked_fill(x == self.ignore_index, self.pad_value)
        if self.mask_prob > 0:
            kept = self._drop_keys(shown)
            given = kwargs.get("self_attn_kv_mask")
            kwargs["self_attn_kv_mask"] = kept if given is None else kept & given.bool()
        model = unwrapped(self.net)
        shares = self.exit_losses.shares(exit_step) if self.exit_losses is not None and model.training else {}
        blocks = tuple(shares)[:-1]
        if model.looped and not return_outputs:
            kwargs.setdefault("capture", Capture())
        out, aux = run_with_aux_loss(
            self.net,
            shown,
            prepend_embeds=prepend_embeds,
            return_intermediates=return_outputs or model.looped,
            return_attn_z_loss=self.add_attn_z_loss,
            return_next_embed_pred=self.next_embed_loss_weight > 0,
            return_embeddings=chunked or (model.looped and not return_outputs),
            return_exits=blocks,
            **kwargs,
        )
        logits, record = out if return_outputs or self.add_attn_z_loss or model.looped else (out, None)
        predicted = embeds = None
        if self.next_embed_loss_weight > 0:
            logits, (predicted, embeds) = logits
        logits, exits = logits if blocks else (logits, {})

        p = 0 if prepend_embeds is None else prepend_embeds.shape[1]
        # labels move to the logits of the token before them; prepended places and the last one have none
        labels = F.pad(x[:, 1:], (p, 1), value=self.ignore_index)
        if model.looped:
            assert record is not None
            loss = self._looped_loss(record, labels[:, p:], kwargs.get("to_logits_kwargs"))
        else:
            losses_of = functools.partial(self._token_losses, labels=labels, arguments=kwargs.get("to_logits_kwargs"))
            each = exit_losses(losses_of, shares, exits, logits) if blocks else losses_of(logits)
            loss = mean_over(each, labels != self.ignore_index)
        if predicted is not None and embeds is not None:
            loss = loss + self._embedding_error(predicted, embeds, labels) * self.next_embed_loss_weight
        if self.add_attn_z_loss:
            assert record is not None
            loss = loss + record.attn_z_loss
        loss = plus_aux_loss(loss, aux)
        loss = reaching(loss, model.to_next_embed_pred if predicted is None else None)
        loss = reaching(loss, model.attn_pool, model.exit_gate, model.exit_norms)
        return (loss, (logits[:, p:-1], record)) if return_outputs else loss

    def _drop_keys(self, x: Tensor) -> Tensor:
        """Draw a `(b, n)` mask, False at random tokens that no query sees; the first token is always kept."""
        noise = torch.randn(x.shape, device=x.device)
        noise[:, 0] = -torch.finfo(noise.dtype).max
        count = min(int(x.shape[1] * self.mask_prob), x.shape[1] - 1)
        hidden = noise.topk(count, dim=-1).indices
        return torch.ones_like(x, dtype=torch.bool).scatter_(1, hidden, False)

    def _looped_loss(self, record: LayerIntermediates, labels: Tensor, arguments: Mapping[str, Any] | None) -> Tensor:
        """Compute the loss of all loops, and of the gates that choose one."""
        assert record.loop_features is not None
        assert record.exit_logits is not None
        logits_of = functools.partial(unwrapped(self.net).logits_of, arguments=arguments)
        outputs = record.loop_features if self.loss_chunk_size is not None else map(logits_of, record.loop_features)
        each = torch.stack([at_least_float32(self._token_losses(out, labels, arguments)) for out in outputs])
        gates = at_least_float32(torch.stack(record.exit_logits)[..., 0])
        threshold, slope, weight = self.looped_options
        return looped_loss(each, gates, labels != self.ignore_index, threshold=threshold, slope=slope, weight=weight)

    def _token_losses(self, out: Tensor, labels: Tensor, arguments: Mapping[str, Any] | None) -> Tensor:
        """Compute the loss of each label, 0 where it does not count.

        Ignored logits take part too, with weight 0: a slice without them would be a copy.

        Args:
            out: logits, or features if the loss is computed in chunks.
            labels: `(b, n)`.
            arguments: of the head.
        """
        model = unwrapped(self.net)
        ignored = self.ignore_index
        if self.loss_chunk_size is None:
            return token_losses(out, labels, ignore_index=ignored, log_probs=model.output_is_log_prob)
        return chunked_losses(model, out, labels, self.loss_chunk_size, ignore_index=ignored, arguments=arguments)

    def _embedding_error(self, predicted: Tensor, embeds: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean of `|predicted[t] - embeds[t + 1]|` over the labels that count and all features."""
        errors = (predicted[:, :-1] - embeds[:, 1:].detach()).abs().mean(dim=-1)
        return mean_over(errors, labels[:, :-1] != self.ignore_index)

    # generation

    @takes_options(
        "eos_token temperature prompt_lens filter_logits_fn restrict_to_max_seq_len amateur_model filter_kwargs "
        "contrastive_decode_kwargs cache_kv return_intermediates * cache compile compile_prefill progress "
        "filter_before_temperature draft_model draft_tokens prompt_lookup draft_layers exit_layer "
        "exit_confidence exit_measure exit_layers"
    )
    @passes_on("net")
    def generate(self, prompts: Ids, seq_len: int, options: GenerationOptions) -> Any:
        """Continue each prompt by at most `seq_len` tokens, in evaluation mode.

        In each step the logits of the last position are contrasted with the amateurs'; the next token is the most
        likely one at temperature 0, otherwise a draw from `softmax(filter(logits / temperature))`.

        The model itself is not touched: other threads may train, copy or save it meanwhile. Its weights must not
        change until the last token.

        Args:
            prompts: `(..., n)` ids as a tensor, an array or a list, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            [options]
            kwargs: of the model's passes. `mask` covers the prompts; `pos`, `sum_embeds` and `embed_ids` cover prompts
                and generated tokens (`embed_ids` may be functions of the ids so far).

        Returns:
            The new tokens, `(..., m)`, m at most `seq_len`; with `return_intermediates` `(tokens, record)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        generation = self._begin(prompts, seq_len, options)
        steps = generation.steps(seq_len, generation.every)
        # what is returned may be used in training, which refuses tensors of inference mode: a record is made without
        # that mode, and tokens are joined outside of it
        with torch.no_grad() if options.return_intermediates else torch.inference_mode(), generation.view:
            tokens = list(with_progress(steps, seq_len) if options.progress else steps)
        joined = generation.join(tokens)
        return (joined, generation.record) if options.return_intermediates else joined

    @takes_options(
        "eos_token * temperature prompt_lens filter_logits_fn restrict_to_max_seq_len amateur_model filter_kwargs "
        "contrastive_decode_kwargs cache_kv cache compile compile_prefill filter_before_temperature draft_model "
        "draft_tokens prompt_lookup draft_layers exit_layer exit_confidence exit_measure exit_layers"
    )
    @passes_on("net")
    def stream(self, prompts: Ids, seq_len: int, options: GenerationOptions) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, `(...)` each, as they come.

        Args:
            prompts: as in `generate`.
            seq_len: number of tokens to generate.
            [options]
            kwargs: of the model's passes, as in `generate`.

        Returns:
            An iterator over tensors of ids, one for each step.

        Raises:
            InputError: at once, with what was given and what is needed.
        """
        generation = self._begin(prompts, seq_len, options)
        steps = functools.partial(generation.steps, seq_len)
        return streamed(steps, in_shape(generation.prompts.lead), generation.view)

    def _begin(self, prompts: Ids, seq_len: int, options: GenerationOptions) -> Generation:
        net = up_to_exit(unwrapped(self.net), options.exit_layer)
        amateurs, draft = options.amateur_model, options.draft_model
        check_length_and_end(seq_len, options.eos_token, net.num_tokens)
        options = replace(options, amateur_model=_nets(amateurs), draft_model=None if draft is None else _net(draft))
        read = self._read(prompts, options)
        compiled = self._compiled_reading(options, read) if options.compiles else None
        return begin(net, read, seq_len, options, self.pad_value, compiled)

    @takes_options(
        "beams return_beams_and_scores eos_token temperature stochastic prompt_lens filter_logits_fn "
        "restrict_to_max_seq_len filter_kwargs cache_kv * cache filter_before_temperature exit_layer "
        "exit_confidence exit_measure exit_layers",
        filter_logits_fn=unchanged,
    )
    @passes_on("net")
    def beam_search(self, prompts: Ids, seq_len: int, options: GenerationOptions) -> Any:
        """Find the continuations of each prompt with the highest probability, among those that beam search meets.

        The score of a continuation is the sum of its tokens' log-probabilities, without temperature and filter. At
        each step every beam proposes its `beams` best tokens, and the `beams` best of all these continue. Temperature
        and filter are for stochastic beams only; a token that the filter removes is never taken, unless nothing else
        is left.

        Args:
            prompts: `(..., n)` ids as a tensor, an array or a list, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            [options]
            kwargs: of the model's passes, as in `generate`. Tensors belong to prompts, and are repeated for the beams.

        Returns:
            The best continuation `(..., m)` of each prompt; with `return_beams_and_scores` `(beams, ..., m)` tokens
            and `(beams, ...)` scores, the best first. A score of -inf means that a filter left too few tokens.

        Raises:
            InputError: with what was given and what is needed.
        """
        net = up_to_exit(unwrapped(self.net), options.exit_layer)
        check_length_and_end(seq_len, options.eos_token, net.num_tokens)
        read = self._read(prompts, options)
        tokens, scores = search(net, read, seq_len, options, self.pad_value)
        tokens = tokens.reshape(options.beams, *read.lead, tokens.shape[-1])
        return (tokens, scores.reshape(-1, *read.lead)) if options.return_beams_and_scores else tokens[0]

    def _read(self, prompts: Ids, options: GenerationOptions) -> Prompts:
        empty = options.arguments.get("prepend_embeds") is not None
        vocabulary = unwrapped(self.net).num_tokens
        return read_prompts(
            as_prompts(prompts, self.net, "`prompts`"),
            options.prompt_lens,
            self.pad_value,
            vocabulary,
            may_be_empty=empty,
        )

    def _compiled_reading(self, options: GenerationOptions, prompts: Prompts) -> CompiledReading:
        """Return the compiled step and prefill for calls of this structure, made when first needed."""
        given = dict(options.compile) if isinstance(options.compile, Mapping) else {}
        present = sorted(name for name, value in options.arguments.items() if value is not None)
        # there is one compiled function for each structure of calls; values of arguments do not change it
        key = (repr(sorted(given.items())), repr(options.early_exit), prompts.lens is None, *present)
        made = self._compiled.get(key)
        if made is None:
            made = CompiledReading(CompiledStep(**given), compiled_prefill(**given), InferenceView(direct=False))
        # graphs refer to the copies of the first view, so that later calls bring these up to date and run them again
        view = InferenceView(unwrapped(self.net), direct=False, earlier=made.view)
        self._compiled[key] = made = made._replace(view=view)
        return made


def _net(model: nn.Module) -> nn.Module:
    """Return a model without what is around it, the wrapper that it was trained in included."""
    model = unwrapped(model)
    return unwrapped(model.net) if isinstance(model, AutoregressiveWrapper) else model


def _nets(amateurs: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if amateurs is None:
        return []
    if isinstance(amateurs, nn.Module) and not isinstance(amateurs, nn.ModuleList):
        return [_net(amateurs)]
    if not isinstance(amateurs, Sequence | nn.ModuleList):
        raise InputError(f"`amateur_model` is {shown(amateurs)}; it must be a model, or a list of models.")
    return [_net(model) for model in amateurs]


def _refuse_without_head(head: str, present: bool, **weights: tuple[float, float]) -> None:
    for name, (value, default) in weights.items():
        if value != default and not present:
            raise ConfigError(f"`{name}` is {value}, but `net` has no such head ({head}); drop it.")


def _check_chunks(net: TransformerWrapper, chunk: int) -> None:
    """Raise a `ConfigError` unless the loss can be computed for `chunk` tokens at a time."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"`loss_chunk_size` is {chunk!r}; it must be a whole number of tokens, at least 1, or None.")
    if not net.own_to_logits and not isinstance(net.to_logits, nn.Linear):
        raise ConfigError(
            f"`loss_chunk_size` is {chunk}, but the head given as `to_logits` is a {type(net.to_logits).__name__}, "
            "which may read several tokens at once; give an `nn.Linear`, or drop `loss_chunk_size`."
        )


def _checked_loss_input(x: Tensor, lens: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the ids in 64 bits, since bytes could not hold `ignore_index`."""
    x = x.long()
    check_predicts(x)
    for name in kwargs:
        if name.startswith("return_") or name == "cache":
            raise InputError(f"`{name}` cannot be given to the loss; use `return_outputs`, or call the net itself.")
    if lens is None:
        return x
    if lens.shape != (x.shape[0],) or lens.is_floating_point() or lens.is_complex() or lens.dtype is torch.bool:
        raise ShapeError(
            f"`lens` has shape {tuple(lens.shape)} and dtype {lens.dtype}; it must hold {x.shape[0]} whole numbers, "
            "the number of valid tokens of each row."
        )
    if (
        lens.device.type == "cpu"
        and values_can_be_read()
        and bool(((lens.long() < 0) | (lens.long() > x.shape[1])).any())
    ):
        raise InputError(f"`lens` holds {lens.tolist()}; the rows have {x.shape[1]} tokens.")
    return x
