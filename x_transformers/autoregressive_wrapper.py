"""Next-token training and generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.beam import Beams, noisy
from x_transformers.decoding.caches import CacheChoice, modify_cached_kv
from x_transformers.decoding.filters import (
    FILTER_LOGITS_FN,
    contrastive_decode_fn,
    find_filter,
    min_p,
    top_a,
    top_k,
    top_p,
)
from x_transformers.decoding.generation_inputs import check_length_and_end
from x_transformers.decoding.loop import (
    Decoding,
    check_next_token_net,
    cut_behind_end,
    eval_decorator,
    evaluating,
    in_shape,
    make_reader,
    pair_amateurs,
    same_vocabulary,
    streamed,
    with_progress,
)
from x_transformers.decoding.prompts import Prompts, align_right, pad_at_dim, read_prompts
from x_transformers.decoding.sampling import adjuster, chooser, gumbel_noise, gumbel_sample, identity
from x_transformers.decoding.speculative import Drafter, Lookup, ModelDrafter, Policy, Speculation
from x_transformers.decoding.step import Prefill, Sequences, Step, compiled_advance, compiled_prefill
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.losses import chunked_token_losses, mean_over, token_losses
from x_transformers.models.embeddings import check_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import prepared
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured

__all__ = [
    "FILTER_LOGITS_FN",
    "AutoregressiveWrapper",
    "align_right",
    "contrastive_decode_fn",
    "eval_decorator",
    "gumbel_noise",
    "gumbel_sample",
    "min_p",
    "modify_cached_kv",
    "pad_at_dim",
    "top_a",
    "top_k",
    "top_p",
]


PATIENCE = 16
"""Tokens between two looks of the host at whether all rows have ended, where looking means to wait for a device."""


class AutoregressiveWrapper(Configured, ReadsReference):
    """A model that is trained to predict the next token, and generates by predicting it again and again.

    Args:
        net: the model.
        ignore_index: label that does not count in the loss.
        pad_value: id put where `ignore_index` stood, before shorter prompts, and behind a row's end token.
        mask_prob: fraction of the keys that is hidden in the loss pass (2210.13432), in [0, 1).
        add_attn_z_loss: add the z-loss of attention; its weight is the model's `attn_z_loss_weight`.
        next_embed_loss_weight: weight of the error of the next token's embedding, which a model with
            `add_continuous_pred_head` predicts too.
        loss_chunk_size: the loss is computed for so many tokens at a time, so that the logits of a large vocabulary
            never stand in memory together; None for all at once. The head then runs twice in training.
        looped_loss_threshold_exit, looped_loss_slope, looped_exit_loss_weight: weights of a head that looped models
            have.

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
    ) -> None:
        super().__init__()
        check_next_token_net(net)
        if not 0 <= mask_prob < 1:
            raise ConfigError(f"`mask_prob` is {mask_prob}; it is the fraction of hidden keys and must lie in [0, 1).")
        if loss_chunk_size is not None:
            _check_chunks(net, loss_chunk_size)
        _refuse_without_head(
            "`add_continuous_pred_head`",
            net.add_continuous_pred_head,
            next_embed_loss_weight=(next_embed_loss_weight, 0.1),
        )
        _refuse_without_head(
            "`looped`",
            net.looped,
            looped_loss_threshold_exit=(looped_loss_threshold_exit, 0.05),
            looped_loss_slope=(looped_loss_slope, 50),
            looped_exit_loss_weight=(looped_exit_loss_weight, 1.0),
        )
        self.net = net
        self.ignore_index, self.pad_value = ignore_index, pad_value
        self.mask_prob, self.add_attn_z_loss = mask_prob, add_attn_z_loss
        self.next_embed_loss_weight = next_embed_loss_weight if net.add_continuous_pred_head else 0.0
        self.loss_chunk_size = loss_chunk_size
        self._compiled: dict[Any, tuple[Step, Prefill]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # compiled steps belong to this object and this process
        return {**self.__dict__, "_compiled": {}}

    @property
    def max_seq_len(self) -> int:
        """The model's own."""
        return self.net.max_seq_len

    # training

    def forward(
        self,
        x: Tensor,
        return_outputs: bool = False,
        prepend_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mean over all valid targets of `-log p(x[t + 1] | x[..t])`.

        A model that predicts embeddings adds the mean of `|pred[t] - embedding[t + 1]|` over the same places and all
        features, times its weight.

        Args:
            x: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            return_outputs: also return `(logits, intermediates)`, logits `(b, n - 1, v)`.
            prepend_embeds: `(b, p, E)` embeddings before the tokens; nothing is predicted at their places.
            lens: `(b,)` valid tokens of each row, from the left.
            kwargs: of the model's pass.

        Returns:
            A scalar; zero, attached to the graph, if there is no valid target.

        Raises:
            InputError: with what was given and what is needed.
        """
        _check_loss_input(x, lens, kwargs)
        chunked = self.loss_chunk_size is not None
        if chunked and return_outputs:
            raise InputError(
                "`return_outputs` gives the logits of all tokens, which `loss_chunk_size` keeps out of memory; call "
                "the net itself for them, or build the wrapper without `loss_chunk_size`."
            )
        kwargs.pop("excise_prepend_embeds", None)  # they are cut off here
        x = x.long()  # bytes could not hold `ignore_index`
        if lens is not None:
            behind = torch.arange(x.shape[1], device=x.device) >= lens.unsqueeze(-1)
            x = x.masked_fill(behind, self.ignore_index)
        shown = x.masked_fill(x == self.ignore_index, self.pad_value)
        if self.mask_prob > 0:
            kept = self._drop_keys(shown)
            given = kwargs.get("self_attn_kv_mask")
            kwargs["self_attn_kv_mask"] = kept if given is None else kept & given.bool()
        out = self.net(
            shown,
            prepend_embeds=prepend_embeds,
            return_intermediates=return_outputs,
            return_attn_z_loss=self.add_attn_z_loss,
            return_next_embed_pred=self.next_embed_loss_weight > 0,
            return_embeddings=chunked,
            **kwargs,
        )
        logits, record = out if return_outputs or self.add_attn_z_loss else (out, None)
        predicted = embeds = None
        if self.next_embed_loss_weight > 0:
            logits, (predicted, embeds) = logits

        p = 0 if prepend_embeds is None else prepend_embeds.shape[1]
        labels = F.pad(x[:, 1:], (p, 1), value=self.ignore_index)
        loss = self._cross_entropy(logits, labels, kwargs.get("to_logits_kwargs"))
        if predicted is not None and embeds is not None:
            loss = loss + self._embedding_error(predicted, embeds, labels) * self.next_embed_loss_weight
        if self.add_attn_z_loss:
            assert record is not None
            loss = loss + record.attn_z_loss
        return (loss, (logits[:, p:-1], record)) if return_outputs else loss

    def _drop_keys(self, x: Tensor) -> Tensor:
        """`(b, n)` bool, False at random tokens that no query sees; the first token always stays."""
        noise = torch.randn(x.shape, device=x.device)
        noise[:, 0] = -torch.finfo(noise.dtype).max
        count = min(int(x.shape[1] * self.mask_prob), x.shape[1] - 1)
        hidden = noise.topk(count, dim=-1).indices
        return torch.ones_like(x, dtype=torch.bool).scatter_(1, hidden, False)

    def _cross_entropy(self, out: Tensor, labels: Tensor, arguments: Mapping[str, Any] | None) -> Tensor:
        """Mean over the labels that count. Every logit goes in, ignored ones too: a slice would be a copy.

        Args:
            out: logits, or features if the loss is computed in chunks.
            labels: `(b, n)`.
            arguments: of the head.
        """
        given: Any = {"ignore_index": self.ignore_index, "log_probs": self.net.output_is_log_prob}
        if self.loss_chunk_size is None:
            each = token_losses(out, labels, **given)
        else:
            head = functools.partial(self.net.logits_of, arguments=arguments)
            each = chunked_token_losses(out, labels, head, self.loss_chunk_size, **given)
        return mean_over(each, labels != self.ignore_index)

    def _embedding_error(self, predicted: Tensor, embeds: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labels that count and all features of `|predicted[t] - embeds[t + 1]|`."""
        errors = (predicted[:, :-1] - embeds[:, 1:].detach()).abs().mean(dim=-1)
        return mean_over(errors, labels[:, :-1] != self.ignore_index)

    # generation

    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        prompt_lens: Tensor | Sequence[int] | None = None,
        filter_logits_fn: str | Callable[..., Tensor] = top_k,
        restrict_to_max_seq_len: bool = True,
        amateur_model: nn.Module | Sequence[nn.Module] | None = None,
        filter_kwargs: Mapping[str, Any] | None = None,
        contrastive_decode_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        cache_kv: bool = True,
        return_intermediates: bool = False,
        *,
        cache: CacheChoice = "dynamic",
        compile: bool | Mapping[str, Any] = False,
        compile_prefill: bool = False,
        progress: bool = False,
        filter_before_temperature: bool = False,
        draft_model: nn.Module | None = None,
        draft_tokens: int | None = None,
        prompt_lookup: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue each prompt by at most `seq_len` tokens, in evaluation mode.

        Each step: logits of the last position, contrasted with the amateurs'; the most likely token at temperature
        0, otherwise a draw from `softmax(filter(logits / temperature))`.

        Args:
            prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: tokens to generate.
            eos_token: what ends a row; `pad_value`s follow. When all rows have ended, generation does.
            temperature: 0 or higher.
            prompt_lens: `(...)` how many ids of each row of `prompts`, from the left, are its prompt.
            filter_logits_fn: "top_p", "top_k", "top_a", "min_p", or a function of logits `(b, v)`.
            restrict_to_max_seq_len: the model sees only its last `max_seq_len` tokens. With a cache this is a
                rolling one, whose keys were computed with more past than the window holds.
            amateur_model: one or more weaker models to contrast with (2210.15097).
            filter_kwargs: keywords of the filter.
            contrastive_decode_kwargs: `alpha` and `beta` of `contrastive_decode_fn`, for all amateurs or for each.
            cache_kv: keep keys and values. False runs the whole sequence at each step.
            return_intermediates: also return the record of the last pass (None without a cache).
            cache: "dynamic"; "static" (fixed buffers, allocated once); or a cache or record of the prompts' first
                tokens, which are then not read again. The cache given stays as it is; one of a single row serves all
                prompts, which then begin with the same tokens.
            compile: compile the step of one token, once for this model, to a full graph over a static cache. May be a
                dict of options for `torch.compile`.
            compile_prefill: with `compile`, also compile the reading of prompts, to one graph for all their lengths.
            progress: show a bar.
            filter_before_temperature: draw from `softmax(filter(logits) / temperature)`, as the reference library does.
            draft_model: a smaller model, or the wrapper that it was trained in, that guesses tokens, of which this one
                judges several in one pass (2211.17192). Tokens are distributed as without it, and at temperature 0
                they are the same. The rows of a batch go on together, by as many tokens as the row with the fewest
                right guesses, so that the gain shrinks with the batch. It gets `kwargs`, too.
            draft_tokens: guesses of a round, by default 4.
            prompt_lookup: guess by looking where the last so many tokens, or fewer, occurred before (2304.04487), in
                place of a model.
            kwargs: of the model's passes. `mask` covers the prompts; `pos`, `sum_embeds` and `embed_ids` cover prompts
                and generated tokens (`embed_ids` may be functions of the ids so far).

        Returns:
            The new tokens, `(..., m)`, m at most `seq_len`; with `return_intermediates`, `(tokens, record)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        decoding, read, models = self._begin(
            prompts,
            seq_len,
            eos_token,
            temperature=temperature,
            prompt_lens=prompt_lens,
            filter_logits_fn=filter_logits_fn,
            restrict_to_max_seq_len=restrict_to_max_seq_len,
            amateur_model=amateur_model,
            filter_kwargs=filter_kwargs,
            contrastive_decode_kwargs=contrastive_decode_kwargs,
            cache_kv=cache_kv,
            cache=cache,
            compile=compile,
            compile_prefill=compile_prefill,
            filter_before_temperature=filter_before_temperature,
            draft_model=draft_model,
            draft_tokens=draft_tokens,
            prompt_lookup=prompt_lookup,
            **kwargs,
        )
        # a record must hold no more than what was generated
        every = 1 if return_intermediates else _patience(read.tokens.device)
        steps = decoding.run(seq_len, eos_token, self.pad_value, every)
        with torch.inference_mode(), evaluating(self, *models), prepared(self, *models):
            new = list(with_progress(steps, seq_len) if progress else steps)
        # outside of inference mode: tokens that training may use
        tokens = torch.cat([read.tokens[:, :0], *new], dim=-1)
        if every > 1:
            tokens = cut_behind_end(tokens, eos_token)
        tokens = tokens.reshape(*read.lead, tokens.shape[1])
        return (tokens, decoding.expert.record) if return_intermediates else tokens

    def stream(
        self, prompts: Tensor | Sequence[Tensor], seq_len: int, eos_token: int | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """The tokens of `generate`, `(...)` each, as they come; the model is in evaluation mode until the last one.

        Args:
            prompts, seq_len, eos_token: as in `generate`.
            options: as in `generate`, but for `return_intermediates` and `progress`.

        Raises:
            InputError: at once, with what was given and what is needed.
        """
        decoding, read, models = self._begin(prompts, seq_len, eos_token, **options)
        steps = functools.partial(decoding.run, seq_len, eos_token, self.pad_value)
        return streamed(steps, in_shape(read.lead), self, *models)

    def _begin(
        self,
        prompts: Tensor | Sequence[Tensor],
        seq_len: int,
        eos_token: int | None,
        *,
        temperature: float = 1.0,
        prompt_lens: Tensor | Sequence[int] | None = None,
        filter_logits_fn: str | Callable[..., Tensor] = top_k,
        restrict_to_max_seq_len: bool = True,
        amateur_model: nn.Module | Sequence[nn.Module] | None = None,
        filter_kwargs: Mapping[str, Any] | None = None,
        contrastive_decode_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        cache_kv: bool = True,
        cache: CacheChoice = "dynamic",
        compile: bool | Mapping[str, Any] = False,
        compile_prefill: bool = False,
        filter_before_temperature: bool = False,
        draft_model: nn.Module | None = None,
        draft_tokens: int | None = None,
        prompt_lookup: int | None = None,
        **kwargs: Any,
    ) -> tuple[Decoding | Speculation, Prompts, list[nn.Module]]:
        """Check everything; the decoding, the prompts as they were read, and the models beside this one."""
        net = self.net
        check_length_and_end(seq_len, eos_token, net.num_tokens)
        choose = chooser(temperature, find_filter(filter_logits_fn), filter_kwargs or {}, filter_before_temperature)
        read = self._read(prompts, prompt_lens, kwargs)
        amateurs = pair_amateurs(_nets(amateur_model), contrastive_decode_kwargs or {}, net.num_tokens)
        guesses = _guesses(draft_model, draft_tokens, prompt_lookup, compiles=compile is not False)
        step, prefill = self._compiled_reading(compile, read, kwargs) if compile is not False else (None, None)
        if step is not None:
            cache = "static" if cache == "dynamic" else cache
        elif compile_prefill:
            raise InputError("`compile_prefill` compiles the reading of prompts beside the steps; set `compile` too.")
        expert = make_reader(
            net,
            read,
            seq_len,
            kwargs,
            cache=cache,
            cache_kv=cache_kv,
            restrict_to_max_seq_len=restrict_to_max_seq_len,
            step=step,
            prefill=prefill if compile_prefill else None,
            at_once=guesses + 1,
        )
        contrasted = [
            (
                make_reader(
                    amateur, read, seq_len, kwargs, cache_kv=cache_kv, restrict_to_max_seq_len=restrict_to_max_seq_len
                ),
                contrast,
            )
            for amateur, contrast in amateurs
        ]
        decoding = Decoding(Sequences(read.tokens, read.start), expert, choose, net.num_tokens, contrasted)
        models: list[nn.Module] = [amateur for amateur, _ in amateurs]
        if not guesses:
            return decoding, read, models
        adjust = adjuster(temperature, find_filter(filter_logits_fn), filter_kwargs or {}, filter_before_temperature)
        policy = Policy(None if temperature == 0 else adjust)
        drafter: Drafter
        if draft_model is None:
            assert prompt_lookup is not None
            drafter = Lookup(prompt_lookup)
        else:
            draft = draft_model.net if isinstance(draft_model, AutoregressiveWrapper) else draft_model
            draft = same_vocabulary(draft, net.num_tokens, "`draft_model`")
            models.append(draft)
            drafter = ModelDrafter(
                make_reader(
                    draft, read, seq_len, kwargs, cache_kv=cache_kv, restrict_to_max_seq_len=restrict_to_max_seq_len
                ),
                policy,
                net.num_tokens,
            )
        readers = [expert, *(reader for reader, _ in contrasted)]
        return Speculation(decoding, readers, drafter, policy, guesses), read, models

    def beam_search(
        self,
        prompts: Tensor | Sequence[Tensor],
        seq_len: int,
        beams: int = 4,
        return_beams_and_scores: bool = False,
        eos_token: int | None = None,
        temperature: float = 1.0,
        stochastic: bool = False,
        prompt_lens: Tensor | Sequence[int] | None = None,
        filter_logits_fn: str | Callable[..., Tensor] = identity,
        restrict_to_max_seq_len: bool = True,
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        *,
        cache: CacheChoice = "dynamic",
        filter_before_temperature: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The continuations of each prompt that the model finds most likely, of those that beam search meets.

        The score of a continuation is the sum of its tokens' log-probabilities, without temperature and filter. At
        each step every beam proposes its `beams` best tokens, and the `beams` best of all these go on.

        Args:
            prompts, prompt_lens: as in `generate`.
            seq_len: tokens to generate.
            beams: how many continuations of a prompt are followed.
            return_beams_and_scores: return all of them, and their scores.
            eos_token: what ends a continuation, which then keeps its score; `pad_value`s follow.
            temperature, filter_logits_fn, filter_kwargs, filter_before_temperature: as in `generate`; for stochastic
                beams alone. What a filter removes is never taken, unless nothing else is left.
            stochastic: propose by `filter(logits / temperature)` with Gumbel noise, which draws without replacement
                (1903.06059), in place of the logits. At temperature 0 there is no noise.
            restrict_to_max_seq_len, cache_kv, cache: as in `generate`.
            kwargs: of the model's passes, as in `generate`. Tensors belong to prompts, and are repeated for the beams.

        Returns:
            The best continuation `(..., m)` of each prompt; with `return_beams_and_scores` `(beams, ..., m)` tokens
            and `(beams, ...)` scores, the best first. A score of -inf says that a filter left too few tokens.

        Raises:
            InputError: with what was given and what is needed.
        """
        net = self.net
        check_length_and_end(seq_len, eos_token, net.num_tokens)
        if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= net.num_tokens:
            raise InputError(
                f"`beams` is {beams!r}; it must be a whole number, at least 1 and at most the vocabulary's size "
                f"{net.num_tokens}, since the first beams differ in their first token."
            )
        adjust = adjuster(temperature, find_filter(filter_logits_fn), filter_kwargs or {}, filter_before_temperature)
        if not stochastic and (filter_logits_fn is not identity or filter_kwargs or filter_before_temperature):
            raise InputError(
                "`filter_logits_fn`, `filter_kwargs` and `filter_before_temperature` change what stochastic beams are "
                "drawn from; set `stochastic = True`, or drop them."
            )
        read = self._read(prompts, prompt_lens, kwargs)
        reader = make_reader(
            net, read, seq_len, kwargs, cache=cache, cache_kv=cache_kv, restrict_to_max_seq_len=restrict_to_max_seq_len
        )
        select = noisy(adjust) if stochastic and temperature > 0 else identity
        search = Beams(Sequences(read.tokens, read.start), reader, beams, select, net.num_tokens, eos_token)
        with torch.inference_mode(), evaluating(self):
            found, scores = search.run(seq_len, self.pad_value, _patience(read.tokens.device))
        tokens, scores = found.transpose(0, 1).clone(), scores.T.clone()  # training may use them
        tokens = tokens.reshape(beams, *read.lead, tokens.shape[-1])
        return (tokens, scores.reshape(beams, *read.lead)) if return_beams_and_scores else tokens[0]

    def _read(
        self,
        prompts: Tensor | Sequence[Tensor],
        prompt_lens: Tensor | Sequence[int] | None,
        kwargs: Mapping[str, Any],
    ) -> Prompts:
        may_be_empty = kwargs.get("prepend_embeds") is not None
        return read_prompts(prompts, prompt_lens, self.pad_value, self.net.num_tokens, may_be_empty=may_be_empty)

    def _compiled_reading(
        self, options: bool | Mapping[str, Any], read: Prompts, kwargs: Mapping[str, Any]
    ) -> tuple[Step, Prefill]:
        """The compiled step and prefill for calls of this structure, made when first asked for."""
        given = dict(options) if isinstance(options, Mapping) else {}
        key = (
            repr(sorted(given.items())),
            read.lens is None,
            *sorted(name for name in kwargs if kwargs[name] is not None),
        )
        if key not in self._compiled:
            self._compiled[key] = compiled_advance(**given), compiled_prefill(**given)
        return self._compiled[key]


def _nets(amateurs: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """The amateurs as a list, and without the wrapper that one was trained in."""
    if amateurs is None:
        return []
    listed = [amateurs] if isinstance(amateurs, nn.Module) and not isinstance(amateurs, nn.ModuleList) else amateurs
    return [model.net if isinstance(model, AutoregressiveWrapper) else model for model in listed]


def _patience(device: torch.device) -> int:
    """Tokens between two looks at whether all rows have ended: an accelerator is not waited for at each token."""
    return 1 if device.type == "cpu" else PATIENCE


def _guesses(draft: nn.Module | None, count: int | None, lookup: int | None, *, compiles: bool) -> int:
    """How many tokens are guessed in a round; 0 for none.

    Raises:
        InputError: if what was given does not go together.
    """
    for name, value in (("draft_tokens", count), ("prompt_lookup", lookup)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"`{name}` is {value!r}; it counts tokens, a whole number, at least 1.")
    if draft is None and lookup is None:
        if count is not None:
            raise InputError(
                f"`draft_tokens` is {count}, but nothing guesses tokens; give a `draft_model` or `prompt_lookup` too."
            )
        return 0
    if draft is not None and lookup is not None:
        raise InputError("`draft_model` and `prompt_lookup` both guess tokens; give one of them.")
    if compiles:
        raise InputError(
            "`compile` reads one token at a time, and speculation (`draft_model`, `prompt_lookup`) several; drop one "
            "of them."
        )
    return 4 if count is None else count


def _refuse_without_head(head: str, present: bool, **weights: tuple[float, float]) -> None:
    for name, (value, default) in weights.items():
        if value != default and not present:
            raise ConfigError(f"`{name}` is {value}, but `net` has no such head ({head}); drop it.")


def _check_chunks(net: TransformerWrapper, chunk: int) -> None:
    """Raise a `ConfigError` unless the loss can be computed for so many tokens at a time."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"`loss_chunk_size` is {chunk!r}; it must be a whole number of tokens, at least 1, or None.")
    if not net.own_to_logits and not isinstance(net.to_logits, nn.Linear):
        raise ConfigError(
            f"`loss_chunk_size` is {chunk}, but the head given as `to_logits` is a {type(net.to_logits).__name__}, "
            "which may read several tokens at once; give an `nn.Linear`, or drop `loss_chunk_size`."
        )


def _check_loss_input(x: Tensor, lens: Tensor | None, kwargs: Mapping[str, Any]) -> None:
    check_ids(x)
    if x.shape[1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; there is no token to learn from.")
    for name in kwargs:
        if name.startswith("return_") or name == "cache":
            raise InputError(f"`{name}` cannot be given to the loss; use `return_outputs`, or call the net itself.")
    if lens is None:
        return
    if lens.shape != (x.shape[0],) or lens.is_floating_point() or lens.dtype is torch.bool:
        raise ShapeError(
            f"`lens` has shape {tuple(lens.shape)} and dtype {lens.dtype}; it must hold {x.shape[0]} whole numbers, "
            "the valid tokens of each row."
        )
    if (
        lens.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and bool(((lens < 0) | (lens > x.shape[1])).any())
    ):
        raise InputError(f"`lens` holds {lens.tolist()}; the rows have {x.shape[1]} tokens.")
