"""A decoder after latent vectors, of which the best of random candidates is trained (2607.27372, 2401.00036)."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.decoding.generation_inputs import cut_arguments, with_rows
from x_transformers.decoding.loop import check_next_token_net
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_prompts
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_aux_loss, mean_over, plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.next_item import check_predicts
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32

__getattr__ = names_of(__name__)

Winner = Callable[..., Tensor]
"""Losses `(b, K)`, or logits `(b, K, n, v)` of prompts, and possibly the record, to a score or an index of each row."""

Latents = Tensor | Sequence[Tensor | None]
"""`(b, m, latent_dim)`, `(b, K, m, latent_dim)` candidates, or for each slot `(b, latent_dim)` or None."""


def lowest_loss_winner_fn(losses: Tensor, intermediates: Any = None) -> Tensor:
    """Return the index of the smallest of `(b, K)` losses in each row."""
    return losses.argmin(dim=-1)


class XMLatentDecoder(SavesFolders):
    """Training of a decoder that continues latent vectors: the best of random candidates learns.

    Latent vectors are embedded before the tokens. Of one of their slots K candidates are drawn, and the loss of a row
    is that of the candidate with the smallest one. If candidates should differ, a weighted divergence of their
    predictions is subtracted,

        mean over positions and k of KL(p_k | M),    M = mean over k of p_k

    Args:
        net: the decoder.
        num_latents: number m of slots.
        dim: width of what is embedded; default the model's embeddings.
        latent_dim: width of latent vectors, which a linear map brings to `dim`; default `dim`.
        candidates: number K.
        max_batch_size: number of rows that run at a time; default all `b * K`.
        ignore_index: label that does not count. In the input it is replaced by id 0.
        latent_drop_prob: probability in training that a pass has no latent vectors.
        always_latent_proj: use a linear map although the widths are equal.
        repulsive_loss_weight: weight of the divergence.
        winner_fn: function of the losses `(b, K)`, and of the record if it takes two arguments, that returns the index
            of a candidate for each row, or scores of which the largest wins; default the smallest loss.
        winner_fns: one for each slot.

    Raises:
        ConfigError: if the model takes no such embeddings, or an option is out of range.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        num_latents: int = 4,
        dim: int | None = None,
        latent_dim: int | None = None,
        candidates: int = 2,
        max_batch_size: int | None = None,
        ignore_index: int = -100,
        latent_drop_prob: float = 0.0,
        always_latent_proj: bool = False,
        repulsive_loss_weight: float = 0.0,
        winner_fn: Winner = lowest_loss_winner_fn,
        winner_fns: Sequence[Winner] | None = None,
    ) -> None:
        super().__init__()
        model = check_next_token_net(net)
        dim = model.emb_dim if dim is None else dim
        latent_dim = dim if latent_dim is None else latent_dim
        if dim != model.emb_dim:
            raise ConfigError(f"`dim` is {dim}; latent vectors go among embeddings, which have width {model.emb_dim}.")
        for name, value in {"num_latents": num_latents, "candidates": candidates, "latent_dim": latent_dim}.items():
            if value < 1:
                raise ConfigError(f"`{name}` is {value}; it must be at least 1.")
        if not 0 <= latent_drop_prob <= 1:
            raise ConfigError(f"`latent_drop_prob` is {latent_drop_prob}; it must lie in [0, 1].")
        if winner_fns is not None and len(winner_fns) != num_latents:
            raise ConfigError(f"`winner_fns` holds {len(winner_fns)} functions; there are {num_latents} slots.")
        _check_rows(max_batch_size, ConfigError)
        self.net, self.num_latents, self.latent_dim, self.candidates = net, num_latents, latent_dim, candidates
        self.max_batch_size, self.ignore_index, self.latent_drop_prob = max_batch_size, ignore_index, latent_drop_prob
        self.repulsive_loss_weight, self.winner_fn, self.winner_fns = repulsive_loss_weight, winner_fn, winner_fns
        self.latent_proj = nn.Linear(latent_dim, dim) if always_latent_proj or latent_dim != dim else None

    @property
    def max_seq_len(self) -> int:
        """Length of the model's table of positions."""
        return unwrapped(self.net).max_seq_len

    def init_latents(self, latents: Latents | None, batch: int, device: torch.device | None = None) -> Tensor:
        """Return latent vectors: those given, and random ones for the others.

        Args:
            latents: what is given, or None.
            batch: number b of rows.
            device: of the result; default that of the model.

        Returns:
            `(b, m, latent_dim)`, or `(b, K, m, latent_dim)` if candidates were given.

        Raises:
            ShapeError: if what is given has another shape.
        """
        like = next(self.net.parameters())
        device = like.device if device is None else device
        if isinstance(latents, Tensor):
            wanted = self.num_latents, self.latent_dim
            if latents.ndim not in (3, 4) or latents.shape[0] != batch or latents.shape[-2:] != wanted:
                raise ShapeError(
                    f"`latents` has shape {tuple(latents.shape)}; it must be ({batch}, {wanted[0]}, {wanted[1]}), or "
                    f"({batch}, K, {wanted[0]}, {wanted[1]}) for candidates."
                )
            return latents.to(device)
        drawn = torch.randn(batch, self.num_latents, self.latent_dim, device=device, dtype=like.dtype)
        if latents is None:
            return drawn
        if len(latents) != self.num_latents:
            raise ShapeError(f"`latents` holds {len(latents)} entries; there are {self.num_latents} slots.")
        slots = list(drawn.unbind(dim=1))
        for slot, given in enumerate(latents):
            if given is not None:
                if given.shape not in ((batch, self.latent_dim), (1, self.latent_dim)):
                    raise ShapeError(
                        f"`latents[{slot}]` has shape {tuple(given.shape)}; it must be ({batch}, {self.latent_dim})."
                    )
                slots[slot] = given.to(drawn).expand(batch, -1)
        return torch.stack(slots, dim=1)

    # training

    @checked
    @passes_on("net")
    def forward(
        self,
        seq: Ids,
        latents: Latents | None = None,
        candidates: int | None = None,
        max_batch_size: int | None = None,
        latent_drop_prob: float | None = None,
        return_loss: bool = True,
        repulsive_loss_weight: float | None = None,
        mask: Tensor | None = None,
        winner_fn: Winner | None = None,
        winner_fns: Sequence[Winner] | None = None,
        active_latent_index: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of the best candidate of each row.

        Args:
            seq: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            latents: `(b, m, latent_dim)`, for each slot `(b, latent_dim)` or None, or candidates `(b, K, m,
                latent_dim)` to use as they are; default random ones.
            candidates, max_batch_size, latent_drop_prob, repulsive_loss_weight: instead of the constructor's.
            return_loss: else return logits and latent vectors.
            mask: `(b, n)` bool, valid tokens.
            winner_fn, winner_fns: instead of the constructor's.
            active_latent_index: the slot of which candidates are drawn; default a random one.
            kwargs: of the model's pass.

        Returns:
            A scalar; or the logits `(b, K, n, v)` and the latent vectors `(b, K, m, latent_dim)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        # drawn even if one is given, so that seeds mean the same
        active = random.randrange(self.num_latents)
        if active_latent_index is not None:
            active = active_latent_index
            if not 0 <= active < self.num_latents:
                raise InputError(f"`active_latent_index` is {active}; the slots are 0 to {self.num_latents - 1}.")
        seq = checked_ids(seq, self).long()
        ids = seq.masked_fill(seq == self.ignore_index, 0)
        if not return_loss:
            given = self._candidates(latents, len(seq), candidates, active)
            logits, *_ = self._run(ids, given, max_batch_size, mask, kwargs, records=False)
            return logits, given
        check_predicts(seq)
        ids, labels, seen = ids[:, :-1], seq[:, 1:], None
        counts = labels != self.ignore_index
        if mask is not None:
            if mask.shape != seq.shape:
                raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be {tuple(seq.shape)}.")
            seen, counts = mask[:, :-1], counts & mask[:, 1:].bool()
        kwargs = cut_arguments(kwargs, 0, ids.shape[1], seq.shape[1])
        drop = self.latent_drop_prob if latent_drop_prob is None else latent_drop_prob
        model = unwrapped(self.net)
        if self.training and random.random() < drop:
            logits, aux = run_with_aux_loss(self.net, ids, mask=seen, **kwargs)
            return self._reaching(plus_aux_loss(mean_over(self._token_losses(logits, labels), counts), aux))
        given = self._candidates(latents, len(seq), candidates, active)
        choose = self._chooser(active, winner_fn, winner_fns)
        logits, records, aux = self._run(ids, given, max_batch_size, seen, kwargs, records=_takes_record(choose))
        each = self._token_losses(logits, labels.unsqueeze(1).expand(logits.shape[:-1]))
        counted = counts.unsqueeze(1)
        losses = each.masked_fill(~counted, 0.0).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
        winners = _winners(choose, losses, records)
        loss = losses.gather(1, winners.unsqueeze(-1)).mean()
        weight = self.repulsive_loss_weight if repulsive_loss_weight is None else float(repulsive_loss_weight)
        if weight > 0 and logits.shape[1] > 1:
            loss = loss - weight * _divergence(logits, counts, log_probs=model.output_is_log_prob)
        return self._reaching(plus_aux_loss(loss, aux))

    def _reaching(self, loss: Tensor) -> Tensor:
        model = unwrapped(self.net)
        return reaching(loss, model.attn_pool, model.to_next_embed_pred, model.exit_norms, self.latent_proj)

    def _token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        given: Any = {"ignore_index": self.ignore_index, "log_probs": unwrapped(self.net).output_is_log_prob}
        return at_least_float32(token_losses(logits, labels, **given))

    def _candidates(self, latents: Latents | None, batch: int, count: int | None, active: int) -> Tensor:
        """Return `(b, K, m, latent_dim)`: those given, or K copies with a random vector in the active slot."""
        count = self.candidates if count is None else count
        if count < 1:
            raise InputError(f"`candidates` is {count}; it must be at least 1.")
        given = self.init_latents(latents, batch)
        if given.ndim == 4:
            return given
        repeated = given.unsqueeze(1).repeat(1, count, 1, 1)
        drawn = torch.randn_like(repeated[:, :, 0])
        # a comparison: in a graph, which draws the slot again at each call, its number is no index
        chosen = torch.arange(self.num_latents, device=repeated.device) == active
        return torch.where(chosen.unsqueeze(-1), drawn.unsqueeze(2), repeated)

    def _run(
        self, ids: Tensor, latents: Tensor, most: int | None, mask: Tensor | None, kwargs: Any, *, records: bool
    ) -> tuple[Tensor, list[LayerIntermediates], Tensor | None]:
        """Return logits `(b, K, n, v)`, with `records` that of each part of the rows that ran together, and the mean
        over these parts of the auxiliary losses.
        """
        most = self.max_batch_size if most is None else most
        _check_rows(most, InputError)
        if "prepend_embeds" in kwargs:
            raise InputError("`prepend_embeds` is where latent vectors go; drop it.")
        (batch, count), embeds = latents.shape[:2], self._embedded(latents).flatten(0, 1)
        rows = batch * count
        arguments = {name: value for name, value in {**kwargs, "mask": mask}.items() if value is not None}
        logits, kept, losses = [], [], []
        for first in range(0, max(rows, 1), most or max(rows, 1)):
            last = min(first + (most or rows), rows)  # a pass of no rows has logits, too
            # the samples of these rows, each as often as it has candidates
            samples = torch.arange(first, last, device=ids.device) // count
            pick = functools.partial(_picked, samples)
            out, aux = run_with_aux_loss(
                self.net,
                ids[samples],
                prepend_embeds=embeds[first:last],
                excise_prepend_embeds=True,
                return_intermediates=records,
                **{name: with_rows(name, value, pick) for name, value in arguments.items()},
            )
            if records:
                out, record = out
                kept.append(record)
            logits.append(out)
            losses.append(aux)
        return torch.cat(logits).unflatten(0, (batch, count)), kept, mean_aux_loss(losses)

    def _embedded(self, latents: Tensor) -> Tensor:
        return latents if self.latent_proj is None else self.latent_proj(latents)

    def _chooser(self, slot: int, fn: Winner | None, fns: Sequence[Winner] | None) -> Winner:
        """Return the function that chooses a candidate of a slot: the caller's, or the constructor's."""
        if fn is None and fns is None:
            fn, fns = self.winner_fn, self.winner_fns
        if fns is not None:
            return fns[slot]
        assert fn is not None
        return fn

    # generation

    @torch.no_grad()
    @checked
    @passes_on(AutoregressiveWrapper.generate, but=("prepend_embeds",))
    def generate(self, start_tokens: Any, seq_len: int, latents: Latents | None = None, **kwargs: Any) -> Any:
        """Continue prompts from latent vectors, in evaluation mode.

        Args:
            start_tokens: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            latents: `(b, m, latent_dim)`, or for each slot `(b, latent_dim)` or None; default random ones.
            kwargs: of `AutoregressiveWrapper.generate`.

        Returns:
            The new tokens; see `AutoregressiveWrapper.generate`.

        Raises:
            InputError: with what was given and what is needed.
        """
        start_tokens = as_prompts(start_tokens, self, "`start_tokens`")
        rows = start_tokens.shape[:-1].numel() if isinstance(start_tokens, Tensor) else len(start_tokens)
        given = self.init_latents(latents, rows)
        if given.ndim == 4:
            raise ShapeError("`latents` are candidates; choose one of them for each row to generate from.")
        wrapper = AutoregressiveWrapper(self.net, ignore_index=self.ignore_index)
        return wrapper.generate(start_tokens, seq_len, prepend_embeds=self._embedded(given), **kwargs)

    @torch.no_grad()
    @checked
    @passes_on(AutoregressiveWrapper.generate, but=("prepend_embeds",))
    def generate_with_candidate_latents(
        self,
        start_tokens: Ids,
        seq_len: int,
        winner_fn: Winner | None = None,
        winner_fns: Sequence[Winner] | None = None,
        candidates: int | None = None,
        latents: Latents | None = None,
        active_latent_index: int | None = None,
        return_best_latents: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Choose latent vectors by what the model expects after prompts, and continue these.

        For each slot that is explored, candidates are drawn, and the one is kept that a function of their logits
        chooses.

        Args:
            start_tokens: `(b, n)` ids.
            seq_len: number of tokens to generate.
            winner_fn: function of the logits `(b, K, n, v)`, and of the record if it takes two arguments, that returns
                the index of a candidate for each row, or scores of which the largest wins.
            winner_fns: one for each slot; all slots are then explored.
            candidates: number K; default the constructor's.
            latents: as in `generate`.
            active_latent_index: the only slot that is explored; default 0, or all with `winner_fns`.
            return_best_latents: also return the latent vectors.
            kwargs: of `AutoregressiveWrapper.generate`.

        Returns:
            The new tokens; or a pair of them and `(candidates, winners)` of the slots explored, a list of `(b, K, m,
            latent_dim)` and of `(b,)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        if (winner_fn is None) == (winner_fns is None):
            raise InputError(
                "pass `winner_fn` or `winner_fns`, and not both: functions of the logits of prompts, of which the one "
                "for losses in the constructor is none."
            )
        if winner_fns is not None and len(winner_fns) != self.num_latents:
            raise InputError(f"`winner_fns` holds {len(winner_fns)} functions; there are {self.num_latents} slots.")
        ids = checked_ids(start_tokens, self).long()
        view = InferenceView(self)
        own, best = view.of(self), self.init_latents(latents, len(ids))
        if best.ndim == 4:
            raise ShapeError("`latents` are candidates; here they are drawn, from (b, m, latent_dim).")
        slots = range(self.num_latents) if winner_fns is not None else (0,)
        tried: list[tuple[Tensor, Tensor]] = []
        with view:
            for slot in slots if active_latent_index is None else (active_latent_index,):
                given, choose = (
                    own._candidates(best, len(ids), candidates, slot),
                    own._chooser(slot, winner_fn, winner_fns),
                )
                logits, records, _ = own._run(ids, given, None, None, {}, records=_takes_record(choose))
                winners = _winners(choose, logits, records)
                best = given[torch.arange(len(ids), device=given.device), winners]
                tried.append((given, winners))
        tokens = self.generate(start_tokens, seq_len, best, **kwargs)
        return (tokens, tuple(map(list, zip(*tried, strict=True)))) if return_best_latents else tokens


def _check_rows(count: int | None, kind: type[Exception]) -> None:
    if count is not None and count < 1:
        raise kind(f"`max_batch_size` is {count}; it is a number of rows, at least 1, or None for all.")


def _picked(samples: Tensor, t: Tensor, axis: int) -> Tensor:
    return t.index_select(axis, samples)


def _winners(choose: Winner, scored: Tensor, records: list[LayerIntermediates]) -> Tensor:
    """Return `(b,)` the index of the best candidate of each row.

    Args:
        choose: of `scored`, and of the records if there are any.
        scored: `(b, K)` losses, or `(b, K, n, v)` logits.
        records: one, or a list of those of several parts of the rows.
    """
    record: Any = records[0] if len(records) == 1 else records
    winners = choose(scored, record) if records else choose(scored)
    winners = winners.argmax(dim=-1) if winners.ndim > 1 else winners
    if winners.shape != scored.shape[:1] or winners.is_floating_point():
        raise ShapeError(
            f"a winner function returned shape {tuple(winners.shape)} and dtype {winners.dtype}; it must return "
            f"({len(scored)},) indices of candidates, or ({len(scored)}, {scored.shape[1]}) scores."
        )
    return winners


def _takes_record(fn: Winner) -> bool:
    """Return True if a function takes a second argument, by its signature: an error inside of it is its own."""
    if fn is lowest_loss_winner_fn:
        return False
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except ValueError:  # some functions of C have none
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [entry for entry in parameters if entry.kind in kinds]
    return len(places) > 1 or any(entry.kind is inspect.Parameter.VAR_POSITIONAL for entry in parameters)


def _divergence(logits: Tensor, counts: Tensor, *, log_probs: bool) -> Tensor:
    """Return the mean over counted positions of `mean over k of KL(p_k | M)`, M the mean of the p_k.

    Args:
        logits: `(b, K, n, v)`; log-probabilities if `log_probs`.
        counts: `(b, n)` bool.
    """
    each = at_least_float32(logits)
    each = each if log_probs else F.log_softmax(each, dim=-1)
    mean = each.logsumexp(dim=1, keepdim=True) - math.log(each.shape[1])
    divergence = (each.exp() * (each - mean)).sum(dim=-1).mean(dim=1)
    return mean_over(divergence, counts)
