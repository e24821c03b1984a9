"""Belief states: a forward and a backward model predict together the tokens between them (2410.23506)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from x_transformers.decoding.filters import min_p
from x_transformers.decoding.generation_inputs import check_seq_len
from x_transformers.decoding.loop import Decoding, make_reader
from x_transformers.decoding.options import GenerationOptions, takes_options
from x_transformers.decoding.prompts import Prompts, read_prompts
from x_transformers.decoding.step import Reader, Sequences
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_ids, as_prompts
from x_transformers.losses import mean_over, plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.next_item import check_predicts
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32, flipped, values_can_be_read
from x_transformers.options.values import shown

__getattr__ = names_of(__name__)

PairWeights = Callable[[Tensor], Tensor]
"""Pairs `(pairs, 2)` of indices i and j to weights, `(pairs,)` or `(pairs, 2)` for the two directions."""


class BeliefStateWrapper(SavesFolders):
    """Training of two decoders whose states, of a prefix and of a suffix, predict the tokens next to them.

    Args:
        forward_decoder: a causal model.
        backward_decoder: another one, which reads reversed sequences; default the same one.
        train_frac_forward_backward_pairs: fraction of the pairs of states that a loss uses, in (0, 1].
        text_head: `(..., 2 d)` pairs of states to `(..., 2 v)` logits, the next token's and the previous one's.
        backward_ar_loss_weight: weight of the previous token's loss.
        pred_distance: predict the distance of the two states.
        pred_distance_loss_weight: weight of this loss.
        cond_on_distance: sometimes condition the text head on the distance.
        cond_on_distance_prob: probability of that, in (0, 1).
        max_pred_distance: all distances from this one on are one class; default `max_seq_len`.

    Raises:
        ConfigError: if the models do not fit each other, or an option is out of range or without effect.
    """

    loss_weights: Tensor

    def __init__(
        self,
        forward_decoder: TransformerWrapper,
        backward_decoder: TransformerWrapper | None = None,
        train_frac_forward_backward_pairs: float = 1.0,
        text_head: nn.Module | None = None,
        backward_ar_loss_weight: float = 1.0,
        pred_distance: bool = False,
        pred_distance_loss_weight: float = 1.0,
        cond_on_distance: bool = False,
        cond_on_distance_prob: float = 0.5,
        max_pred_distance: int | None = None,
    ) -> None:
        super().__init__()
        backward_decoder = forward_decoder if backward_decoder is None else backward_decoder
        forward, backward = _check_decoders(forward_decoder, backward_decoder)
        _check_fractions(train_frac_forward_backward_pairs, cond_on_distance_prob)
        if not pred_distance and (max_pred_distance is not None or pred_distance_loss_weight != 1):
            raise ConfigError(
                "`max_pred_distance` and `pred_distance_loss_weight` concern predicted distances; set `pred_distance "
                "= True`, or drop them."
            )
        dim, vocabulary = forward.attn_layers.dim, forward.num_tokens
        self.forward_decoder, self.backward_decoder = forward_decoder, backward_decoder
        self.train_frac, self.num_tokens = train_frac_forward_backward_pairs, vocabulary
        self.pred_distance_loss_weight, self.cond_on_distance_prob = pred_distance_loss_weight, cond_on_distance_prob
        self.suffix_token = nn.Parameter(torch.randn(backward.emb_dim) * 0.02)
        self.text_head = text_head if text_head is not None else _two_layers(dim * 2, dim, vocabulary * 2)
        self.max_pred_distance = max_pred_distance or forward.max_seq_len
        if pred_distance and self.max_pred_distance < 2:
            raise ConfigError(
                f"`max_pred_distance` is {self.max_pred_distance}; distances begin at 2, so it must be larger (it is "
                "`max_seq_len` by default)."
            )
        self.to_distance_logits = _two_layers(dim * 2, dim, self.max_pred_distance) if pred_distance else None
        self.to_distance_cond = (
            nn.Sequential(Rearrange("... -> ... 1"), *_two_layers(1, dim, dim * 2)) if cond_on_distance else None
        )
        self.register_buffer("loss_weights", torch.tensor([1.0, backward_ar_loss_weight]))

    # training

    @checked
    def forward(
        self,
        seq: Ids,
        lens: Tensor | None = None,
        loss_weight_by_fb_indices: PairWeights | None = None,
    ) -> Tensor:
        """Compute the mean of `-log p(token | f_i, g_j)` over all pairs of states with j - i >= 2 and both directions.

        `f_i` has read `x[0..i]` and predicts, with `g_j`, the token `x[i + 1]`; `g_j` has read the end and
        `x[L-1..j]`, and predicts `x[j - 1]`.

        Args:
            seq: `(b, n)` ids.
            lens: `(b,)` number of tokens L of each row, from the left; what follows them is ignored.
            loss_weight_by_fb_indices: weights of pairs.

        Returns:
            A scalar; zero, attached to the graph, if there is no pair.

        Raises:
            InputError: with what was given and what is needed.
        """
        seq = checked_ids(seq, self)
        check_predicts(seq)
        lens = _lengths(lens, seq)
        seq = seq.long().masked_fill(torch.arange(seq.shape[1], device=seq.device) >= lens.unsqueeze(-1), 0)
        f, g, aux = self._states(seq, lens)
        pairs = self._pairs(seq.shape[1], seq.device)
        if len(pairs) == 0:
            return self._reaching(plus_aux_loss((f.sum() + g.sum()) * 0.0, *aux), self.text_head)
        i, j = pairs.unbind(dim=-1)
        # j = L is valid: that state has read the end and no token
        valid = j <= lens.unsqueeze(-1)
        states, distance = torch.cat((f[:, i], g[:, j]), dim=-1), j - i
        labels = torch.stack((seq[:, i + 1], seq[:, j - 1]), dim=-1)
        weights = self._weights(pairs, loss_weight_by_fb_indices)
        # the distance is either an input or a target
        if self.to_distance_cond is not None and bool(torch.rand(()) < self.cond_on_distance_prob):
            conditioned = states * self.to_distance_cond(distance.to(states.dtype))
            return self._reaching(plus_aux_loss(self._text_loss(conditioned, labels, valid, weights), *aux))
        loss = plus_aux_loss(self._text_loss(states, labels, valid, weights), *aux)
        if self.to_distance_logits is not None:
            loss = loss + self._distance_loss(states, distance, valid) * self.pred_distance_loss_weight
        return self._reaching(loss)

    def _reaching(self, loss: Tensor, *further: nn.Module) -> Tensor:
        """Return the loss with gradients for what it does not read: the decoders' own heads, a distance not drawn."""
        nets = [unwrapped(net) for net in (self.forward_decoder, self.backward_decoder)]
        names = ("to_logits", "logit_changes", "mixture", "to_next_embed_pred", "attn_pool", "exit_norms")
        heads = [getattr(net, name) for net in nets for name in names]
        return reaching(loss, *heads, self.to_distance_cond, self.to_distance_logits, *further)

    def _states(self, seq: Tensor, lens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
        """Return `f (b, n, d)` and `g (b, n + 1, d)`, whose values after a row's length are arbitrary, and the
        auxiliary losses of both models.
        """
        f, of_forward = run_with_aux_loss(self.forward_decoder, seq, return_embeddings=True)
        places = torch.arange(seq.shape[1] + 1, device=seq.device)
        # each row is reversed in itself, so that the end comes before its last token
        reversed_seq = seq.gather(1, (lens.unsqueeze(-1) - 1 - places[:-1]).clamp(min=0))
        given = {"prepend_embeds": self._end(len(seq)), "return_embeddings": True}
        read, of_backward = run_with_aux_loss(self.backward_decoder, reversed_seq, **given)
        # `g_j` has read the end and then L - j tokens, so that it is output L - j of the reversed pass
        order = (lens.unsqueeze(-1) - places).clamp(min=0)
        g = read.gather(1, order.unsqueeze(-1).expand(-1, -1, read.shape[-1]))
        return f, g, (of_forward, of_backward)

    def _end(self, batch: int) -> Tensor:
        """Return `(b, 1, E)` the embedding that the backward model reads first."""
        return self.suffix_token.expand(batch, 1, -1)

    def _pairs(self, n: int, device: torch.device) -> Tensor:
        """Return `(pairs, 2)` indices i < n and j <= n with at least one token between."""
        pairs = torch.triu_indices(n, n + 1, offset=2, device=device).T
        if self.train_frac == 1 or len(pairs) == 0:
            return pairs
        count = max(1, int(self.train_frac * len(pairs)))
        return pairs[torch.randperm(len(pairs), device=device)[:count]]

    def _weights(self, pairs: Tensor, by_pair: PairWeights | None) -> Tensor:
        """Return `(pairs, 2)` weights of both directions."""
        if by_pair is None:
            return self.loss_weights.expand(len(pairs), -1)
        given = by_pair(pairs)
        if given.shape not in ((len(pairs),), (len(pairs), 2)):
            raise ShapeError(
                f"`loss_weight_by_fb_indices` returns a tensor of shape {tuple(given.shape)}; it must be "
                f"({len(pairs)},) or ({len(pairs)}, 2)."
            )
        return self.loss_weights * (given.unsqueeze(-1) if given.ndim == 1 else given)

    def _text_loss(self, states: Tensor, labels: Tensor, valid: Tensor, weights: Tensor) -> Tensor:
        """Compute `sum of w * l / number of terms`; labels are `(b, pairs, 2)`."""
        logits = self.text_head(states)
        if logits.shape[-1] != self.num_tokens * 2:
            raise ShapeError(f"`text_head` returns width {logits.shape[-1]}; it must be {self.num_tokens * 2}, 2 v.")
        each = at_least_float32(token_losses(logits.unflatten(-1, (2, -1)), labels))
        return mean_over(each * weights, valid.unsqueeze(-1).expand_as(each))

    def _distance_loss(self, states: Tensor, distance: Tensor, valid: Tensor) -> Tensor:
        """Compute the loss of states `(b, pairs, 2 d)` at distance `(pairs,)`."""
        assert self.to_distance_logits is not None
        classes = distance.clamp(max=self.max_pred_distance - 1).expand(len(states), -1)
        return mean_over(token_losses(self.to_distance_logits(states), classes), valid)

    # generation

    @takes_options(
        "temperature cache_kv suffix filter_logits_fn filter_kwargs decode_backwards * filter_before_temperature",
        further=False,
        temperature=1.25,
        cache_kv=False,
        filter_logits_fn=min_p,
    )
    def generate_with_suffix_cond(
        self,
        prompts: Ids,
        seq_len: int,
        options: GenerationOptions,
        suffix: Ids | None = None,
        decode_backwards: bool = False,
    ) -> Tensor:
        """Continue each prompt by `seq_len` tokens that lead to a suffix, in evaluation mode.

        Args:
            prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            suffix: `(m,)` ids for all rows, or `(b, m)`; default only the end.
            decode_backwards: the prompts are ends, and what comes before them is generated, from the right to the left,
                in which order it is returned. The forward state is that of a random token.
            [options]

        Returns:
            The new tokens, `(..., seq_len)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        check_seq_len(seq_len)
        if not isinstance(decode_backwards, bool):
            raise InputError(f"`decode_backwards` is {shown(decode_backwards)}; it must be True or False.")
        suffix = None if suffix is None else as_ids(suffix, self, "`suffix`")
        if decode_backwards and suffix is not None:
            raise InputError("`suffix` is what forward decoding leads to; drop it, or `decode_backwards`.")
        given = as_prompts(prompts, self, "`prompts`")
        read = read_prompts(
            _reversed(given) if decode_backwards else given, None, 0, self.num_tokens, may_be_empty=decode_backwards
        )
        if decode_backwards:
            options = replace(options, arguments={"prepend_embeds": self._end(len(read.tokens))})
        view = InferenceView(self)
        own = view.of(self)
        with torch.inference_mode(), view:
            other = own._other_state(read, suffix, decode_backwards)
            net = unwrapped(own.backward_decoder if decode_backwards else own.forward_decoder)
            growing = lambda first, last, others: {"return_embeddings": True}  # noqa: E731
            reader = make_reader(net, read, seq_len, options, growing=growing)
            paired = _Paired(reader, own.text_head, other, backwards=decode_backwards)
            decoding = Decoding(Sequences(read.tokens, read.start), paired, options.choose, self.num_tokens)
            new = list(decoding.run(seq_len, None, 0))
        # outside of inference mode: tokens that training may use
        tokens = torch.cat([read.tokens[:, :0], *new], dim=-1)
        return tokens.reshape(*read.lead, seq_len)

    def _other_state(self, read: Prompts, suffix: Tensor | None, backwards: bool) -> Tensor:
        """Return `(b, 1, d)` the state that all new tokens are paired with."""
        batch, device = len(read.tokens), read.tokens.device
        if backwards:
            token = torch.randint(self.num_tokens, (batch, 1), device=device)
            return self.forward_decoder(token, return_embeddings=True)
        if suffix is None or suffix.numel() == 0:
            ids = torch.zeros(batch, 0, dtype=torch.long, device=device)
        elif suffix.ndim == 1 or (suffix.ndim == 2 and len(suffix) == batch):
            ids = read_prompts(suffix, None, 0, self.num_tokens).tokens.flip(1).expand(batch, -1)
        else:
            raise ShapeError(f"`suffix` has shape {tuple(suffix.shape)}; it must be (m,) or ({batch}, m).")
        read_suffix = self.backward_decoder(ids, prepend_embeds=self._end(batch), return_embeddings=True)
        return read_suffix[:, -1:]


class _Paired(Reader):
    """Reads one model, and returns logits of the text head for its states paired with a state of the other.

    Args:
        reader: of the first model's features.
        head: pairs of states to logits of both directions.
        other: `(b, 1, d)`.
        backwards: the first model reads backwards.
    """

    def __init__(self, reader: Reader, head: nn.Module, other: Tensor, *, backwards: bool) -> None:
        self.reader, self.head, self.other, self.backwards, self.record = reader, head, other, backwards, None

    def read(self, sequences: Sequences) -> Tensor:
        state = self.reader.read(sequences)[:, -1:]
        # the head takes the forward state first, and returns logits of the next token and then of the previous one
        pair = (self.other, state) if self.backwards else (state, self.other)
        return self.head(torch.cat(pair, dim=-1)).chunk(2, dim=-1)[int(self.backwards)]


def _two_layers(dim_in: int, dim: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim), nn.LeakyReLU(), nn.Linear(dim, dim_out))


def _reversed(prompts: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Reverse each prompt; what is no prompt is left for `read_prompts` to refuse."""
    if isinstance(prompts, Tensor):
        return flipped(prompts) if prompts.ndim else prompts
    return [flipped(prompt) if isinstance(prompt, Tensor) and prompt.ndim else prompt for prompt in prompts]


def _check_decoders(forward: Any, backward: Any) -> tuple[TransformerWrapper, TransformerWrapper]:
    forward, backward = unwrapped(forward), unwrapped(backward)
    for name, net in (("forward_decoder", forward), ("backward_decoder", backward)):
        if not isinstance(net, TransformerWrapper):
            raise ConfigError(f"`{name}` is a {type(net).__name__}; it must be a TransformerWrapper around a stack.")
        if not net.attn_layers.causal or net.pools:
            raise ConfigError(f"`{name}` must have a state for each prefix: a causal stack (a Decoder), no pooling.")
    if forward.num_tokens != backward.num_tokens or forward.attn_layers.dim != backward.attn_layers.dim:
        raise ConfigError(
            f"the decoders have vocabularies of {forward.num_tokens} and {backward.num_tokens}, and widths of "
            f"{forward.attn_layers.dim} and {backward.attn_layers.dim}; both must agree."
        )
    return forward, backward


def _check_fractions(of_pairs: float, conditioned: float) -> None:
    if not 0 < of_pairs <= 1:
        raise ConfigError(f"`train_frac_forward_backward_pairs` is {of_pairs}; it must lie in (0, 1].")
    if not 0 < conditioned < 1:
        raise ConfigError(f"`cond_on_distance_prob` is {conditioned}; it must lie in (0, 1).")


def _lengths(lens: Tensor | None, seq: Tensor) -> Tensor:
    """Return `(b,)` the number of tokens of each row."""
    batch, n = seq.shape
    if lens is None:
        return torch.full((batch,), n, device=seq.device)
    if lens.shape != (batch,) or lens.is_floating_point() or lens.dtype is torch.bool:
        raise ShapeError(
            f"`lens` has shape {tuple(lens.shape)} and dtype {lens.dtype}; it must hold {batch} whole numbers."
        )
    lens = lens.long()
    if values_can_be_read() and bool(((lens < 0) | (lens > n)).any()):
        raise InputError(f"`lens` holds {lens.tolist()}; the rows have {n} tokens.")
    return lens
