"""Feedback of deep states into the next position, trained by parallel passes (2608.08888)."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.decoding.filters import FILTER_LOGITS_FN as FILTER_LOGITS_FN  # scripts import it from here
from x_transformers.decoding.filters import top_k
from x_transformers.decoding.generation_inputs import check_length_and_end, cut_arguments
from x_transformers.decoding.loop import Decoding, check_next_token_net, cut_after_end, make_reader
from x_transformers.decoding.options import GenerationOptions
from x_transformers.decoding.prompts import read_prompts
from x_transformers.decoding.step import Branching, Sequences
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked, read_mask
from x_transformers.forward_pass.arrays import Ids, as_prompts
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_aux_loss, mean_over, plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.heads import LinearNoBias, TiedLogits
from x_transformers.models.next_item import check_predicts
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.norms import RMSNorm
from x_transformers.modules.unwrap import unwrapped

__getattr__ = names_of(__name__)

Transition = Callable[[Tensor, Tensor], Tensor]
"""Latents `(b, n, d)` of the positions before, and the stream `(b, n, d)` that they enter, to a new stream."""

STATES = Capture(hiddens=True)


class LossBreakdown(NamedTuple):
    """Loss of the first pass, of each pass with feedback, and of all of them."""

    first_pass_loss: Tensor
    feedback_pass_losses: list[Tensor]
    all_pass_losses: list[Tensor]


# transitions


class GLUCrossTransition(nn.Module):
    """Latents gated by the stream: `N(W_s N_l(l) * sigmoid(W_g N_s(s)))`, N RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_state, self.to_gate = LinearNoBias(dim, dim), LinearNoBias(dim, dim)
        self.latent_norm, self.stream_norm, self.norm = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, latents: Tensor, stream: Tensor) -> Tensor:
        """Return the new stream, `(b, n, d)` like both given."""
        state, gate = self.to_state(self.latent_norm(latents)), self.to_gate(self.stream_norm(stream))
        return self.norm(state * gate.sigmoid())


class ResidualTransition(nn.Module):
    """Latents added to the stream: `N(s + c W N_l(l))`."""

    def __init__(self, dim: int, scale_init: float = 0.1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale_init))
        self.proj, self.latent_norm, self.norm = LinearNoBias(dim, dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, latents: Tensor, stream: Tensor) -> Tensor:
        """Return the new stream, `(b, n, d)` like both given."""
        return self.norm(stream + self.scale * self.proj(self.latent_norm(latents)))


class GRUGatingTransition(nn.Module):
    """A gated step from the stream: `N(s + z * (tanh(W_c [l'; s']) - s))`, `z = sigmoid(W_z [l'; s'] + b)`.

    l' and s' are normalized latents and stream; b begins at -1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim * 2, dim)
        nn.init.constant_(self.gate.bias, -1.0)
        self.to_candidate = LinearNoBias(dim * 2, dim)
        self.latent_norm, self.stream_norm, self.norm = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, latents: Tensor, stream: Tensor) -> Tensor:
        """Return the new stream, `(b, n, d)` like both given."""
        both = torch.cat((self.latent_norm(latents), self.stream_norm(stream)), dim=-1)
        step = self.to_candidate(both).tanh() - stream
        return self.norm(stream + self.gate(both).sigmoid() * step)


class LinearTransition(nn.Module):
    """A sum of linear maps: `N(W_1 N_l(l) + W_2 N_s(s))`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_state, self.to_stream = LinearNoBias(dim, dim), LinearNoBias(dim, dim)
        self.latent_norm, self.stream_norm, self.norm = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, latents: Tensor, stream: Tensor) -> Tensor:
        """Return the new stream, `(b, n, d)` like both given."""
        return self.norm(self.to_state(self.latent_norm(latents)) + self.to_stream(self.stream_norm(stream)))


class ResidualGLUTransition(nn.Module):
    """A `GLUCrossTransition` added to the stream: `N(s + c glu(l, s))`."""

    def __init__(self, dim: int, scale_init: float = 1.0) -> None:
        super().__init__()
        self.glu = GLUCrossTransition(dim)
        self.scale, self.norm = nn.Parameter(torch.tensor(scale_init)), RMSNorm(dim)

    def forward(self, latents: Tensor, stream: Tensor) -> Tensor:
        """Return the new stream, `(b, n, d)` like both given."""
        return self.norm(stream + self.scale * self.glu(latents, stream))


TRANSITIONS: dict[str, Callable[[int], nn.Module]] = {
    "glu": GLUCrossTransition,
    "residual": ResidualTransition,
    "gru": GRUGatingTransition,
    "linear": LinearTransition,
    "residual_glu": ResidualGLUTransition,
}

RECIRC_SHORTCUTS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "paper": lambda depth: [(depth, 1)],
    "prev": lambda depth: [(block, block - 1) for block in range(2, depth + 1)],
    "top_and_prev": lambda depth: list(dict.fromkeys([(depth, 1), *((b, b - 1) for b in range(2, depth + 1))])),
    "prev_with_self": lambda depth: [(block, max(block - 1, 1)) for block in range(1, depth + 1)],
    "self": lambda depth: [(block, block) for block in range(1, depth + 1)],
    "full": lambda depth: [(block, 1) for block in range(1, depth + 1)],
    "dense": lambda depth: [(source, to) for source in range(1, depth + 1) for to in range(1, depth + 1)],
}


def resolve_transition(spec: str | nn.Module, dim: int) -> nn.Module:
    """Return the transition of a name, or the module given.

    Raises:
        ConfigError: if there is none of this name.
    """
    if isinstance(spec, nn.Module):
        return spec
    if spec not in TRANSITIONS:
        raise ConfigError(f"`transition` is {spec!r}; it must be a module, or {' or '.join(map(repr, TRANSITIONS))}.")
    return TRANSITIONS[spec](dim)


def resolve_recirc_pairs(depth: int, recirc_pairs: str | Sequence[Any] | None) -> list[tuple[Any, ...]]:
    """Return pairs of blocks, source and destination, counted from 1, some with a transition as third item.

    Raises:
        ConfigError: if a name or a block does not exist, or a pair occurs twice.
    """
    given = "paper" if recirc_pairs is None else recirc_pairs
    if isinstance(given, str):
        if given not in RECIRC_SHORTCUTS:
            names = ", ".join(map(repr, RECIRC_SHORTCUTS))
            raise ConfigError(f"`recirc_pairs` is {given!r}; it must be pairs of blocks, or one of {names}.")
        given = RECIRC_SHORTCUTS[given](depth)
    if not all(isinstance(pair, list | tuple) for pair in given):
        raise ConfigError(f"`recirc_pairs` is {given!r}; it must be pairs of blocks (from, to), or a name.")
    pairs = [tuple(pair) for pair in given]
    for pair in pairs:
        if len(pair) not in (2, 3) or not all(isinstance(block, int) and 1 <= block <= depth for block in pair[:2]):
            raise ConfigError(
                f"`recirc_pairs` holds {pair}; a pair is (from, to) or (from, to, transition), of blocks 1 to {depth}."
            )
    if not pairs or len({pair[:2] for pair in pairs}) < len(pairs):
        raise ConfigError(f"`recirc_pairs` is {pairs}; there must be a pair, and none twice.")
    return pairs


# fusing latents into a stream


def uniform_like(t: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return random numbers of a uniform distribution, of the shape of t."""
    return torch.empty_like(t).uniform_(low, high)


def shift_and_fuse_latents(latents: Tensor, stream: Tensor, transition: Transition) -> Tensor:
    """Return the stream, in which every position but the first reads the latent of the position before it.

    Args:
        latents: `(b, n, d)` of an earlier pass.
        stream: `(b, n, d)`.
        transition: of both.
    """
    return torch.cat((stream[:, :1], transition(latents[:, :-1], stream[:, 1:])), dim=1)


def fuse_last_latent(latents: Tensor, stream: Tensor, transition: Transition) -> Tensor:
    """Return the stream `(b, 1, d)` of one new token, which reads the last one of the latents `(b, n, d)`."""
    return transition(latents[:, -1:], stream)


def dynamic_rollout_loss_weights(step_losses: Tensor, decay: float = 1.0, threshold: float = 1.0) -> Tensor:
    """Return `w_k = exp(-decay * sum over j < k of max(L_j - threshold, 0))` for the losses `(k,)`, as constants."""
    excess = (step_losses.detach() - threshold).relu()
    return (-decay * (excess.cumsum(dim=0) - excess)).exp()


def get_block_latent(intermediates: LayerIntermediates, depth: int) -> Tensor:
    """Return the stream after a block, counted from 1; of the last block, after the final norm."""
    assert intermediates.block_hiddens is not None
    return intermediates.block_hiddens[depth - 1]


class FullBandwidth(SavesFolders):
    """A decoder whose positions read deep states of the position before them.

    Training runs parallel passes: the first one is plain, and in each later one the blocks of some routes read,
    shifted by one position, what other blocks returned in the pass before. With the losses L_k of the passes,

        L = L_0 + feedback_pass_weight * A,    A the mean of L_1 ... L_{T - 1}

    or, with dynamic weights `w_k = exp(-decay * sum over j < k of max(L_j - threshold, 0))`, A their weighted mean.
    Generation runs a token once, with the states of the token before it.

    Args:
        net: a `Decoder` with `depth_scale_residual`, in a model with `tie_embedding` and `post_emb_norm`.
        temporal_parallel_passes: number T of passes.
        recirc_pairs: routes, (from, to) or (from, to, transition), of blocks counted from 1; or a name: "paper" from
            the last to the first block, "prev" from each block to the one below, "top_and_prev" both, "prev_with_self"
            the same and from the first to itself, "self", "full" from all to the first, "dense" all to all.
        transition: "glu", "residual", "gru", "linear", "residual_glu", or a module; default "glu".
        transitions: of single routes by (from, to), or of all routes to a block by its number.
        feedback_pass_weight: weight of the passes with feedback.
        ignore_index: label that does not count. In the input it is replaced by id 0.
        jitter_noise_delta: latents get noise between minus this and this in training.
        dynamic_rollout_loss_weight, dynamic_loss_decay, dynamic_loss_threshold: dynamic weights of the passes.

    Raises:
        ConfigError: if the model is another one, or an option is out of range.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        temporal_parallel_passes: int = 2,
        recirc_pairs: str | Sequence[Any] | None = None,
        transition: str | nn.Module | None = None,
        transitions: Mapping[Any, str | nn.Module] | None = None,
        feedback_pass_weight: float = 1.0,
        ignore_index: int = -100,
        jitter_noise_delta: float = 0.02,
        dynamic_rollout_loss_weight: bool = False,
        dynamic_loss_decay: float = 0.5,
        dynamic_loss_threshold: float = 1.0,
    ) -> None:
        super().__init__()
        model = _check_net(net)
        _check_passes(temporal_parallel_passes, ConfigError)
        if jitter_noise_delta < 0:
            raise ConfigError(f"`jitter_noise_delta` is {jitter_noise_delta}; noise has a size of 0 or more.")
        self.net, self.temporal_parallel_passes = net, temporal_parallel_passes
        self.feedback_pass_weight, self.ignore_index = feedback_pass_weight, ignore_index
        self.jitter_noise_delta = jitter_noise_delta
        self.dynamic_rollout_loss_weight = dynamic_rollout_loss_weight
        self.dynamic_loss_decay, self.dynamic_loss_threshold = dynamic_loss_decay, dynamic_loss_threshold
        pairs = resolve_recirc_pairs(model.attn_layers.steps[-1].block + 1, recirc_pairs)
        self.recirc_pairs = [pair[:2] for pair in pairs]
        given, default = dict(transitions or {}), "glu" if transition is None else transition
        unknown = [
            key for key in given if key not in self.recirc_pairs and key not in {to for _, to in self.recirc_pairs}
        ]
        if unknown:
            raise ConfigError(f"`transitions` names {unknown}; the routes are {self.recirc_pairs}.")
        self.transitions = nn.ModuleDict()
        for source, to, *own in pairs:
            spec = own[0] if own else given.get((source, to), given.get(to, default))
            self.transitions[f"{source}->{to}"] = resolve_transition(spec, model.attn_layers.dim)

    def make_transforms(
        self,
        intermediates: LayerIntermediates,
        training: bool = False,
        override_transition: Transition | None = None,
        generate: bool = False,
        start: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[int, Callable[[Tensor], Tensor]]:
        """Return what a pass does to the input of each block that a route ends in, by its number.

        Args:
            intermediates: of the pass before, with the streams after its blocks.
            training: add noise to latents.
            override_transition: instead of those of all routes.
            generate: the pass is over a token that follows those of the pass before, instead of the same tokens.
            start: `(b,)` number of padding tokens on the left, of which the first token of a row reads nothing.
            mask: `(b, n)` visible tokens, with `generate` those so far; what follows a hidden one reads nothing.
        """
        routes: dict[int, list[tuple[Tensor, Transition]]] = {}
        assert intermediates.last_layer_hiddens is not None
        # memory tokens come before the tokens, in the first pass of a text only
        count = intermediates.last_layer_hiddens.shape[1]
        for source, to in self.recirc_pairs:
            latents = _merged(get_block_latent(intermediates, source), intermediates)[:, -count:]
            if training and self.jitter_noise_delta > 0:
                latents = latents + uniform_like(latents, -self.jitter_noise_delta, self.jitter_noise_delta)
            transition = override_transition or self.transitions[f"{source}->{to}"]
            routes.setdefault(to, []).append((latents, transition))
        if generate:
            before = None if mask is None else read_mask(mask, "mask")[:, -2:-1]
            return {to: functools.partial(_fuse_all, fuse_last_latent, before, into) for to, into in routes.items()}
        before = _seen_before(start, mask, count)
        return {to: functools.partial(_fuse_all, shift_and_fuse_latents, before, into) for to, into in routes.items()}

    # training

    @checked
    @passes_on("net")
    def forward(
        self,
        token_ids: Ids,
        return_loss: bool = True,
        temporal_parallel_passes: int | None = None,
        return_loss_breakdown: bool = False,
        return_all_pass_logits: bool = False,
        transition: Transition | None = None,
        dynamic_rollout_loss_weight: bool | None = None,
        dynamic_loss_decay: float | None = None,
        dynamic_loss_threshold: float | None = None,
        return_all: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the loss, or the logits of the last pass.

        Args:
            token_ids: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            return_loss: else return logits.
            temporal_parallel_passes: number of passes; default the constructor's.
            return_loss_breakdown: also return the losses of the passes.
            return_all_pass_logits: also return the logits of all passes.
            transition: instead of those of all routes: a function of latents and stream.
            dynamic_rollout_loss_weight, dynamic_loss_decay, dynamic_loss_threshold: instead of the constructor's.
            return_all: return all of the above.
            kwargs: of the model's passes.

        Returns:
            A scalar or logits `(b, n, v)`; or a named tuple of it (`loss` or `logits`) and what else was requested,
            `loss_breakdown` and `all_pass_logits`.

        Raises:
            InputError: with what was given and what is needed.
        """
        passes = self.temporal_parallel_passes if temporal_parallel_passes is None else temporal_parallel_passes
        _check_passes(passes, InputError)
        _check_transition(transition)
        ids = _checked_ids(checked_ids(token_ids, self), kwargs)
        shown, labels = ids.masked_fill(ids == self.ignore_index, 0), ids[:, 1:]
        if return_loss:
            check_predicts(ids)
            shown, kwargs = shown[:, :-1], cut_arguments(kwargs, 0, ids.shape[1] - 1, ids.shape[1])
        elif return_loss_breakdown:
            raise InputError("`return_loss_breakdown` needs a loss; leave `return_loss` at True.")
        outputs, record, parts = [], None, []
        for _ in range(passes):
            (logits, record), aux = self._pass(shown, record, transition, kwargs)
            outputs.append(logits)
            parts.append(aux)
        fields: dict[str, Any] = {"logits": outputs[-1]}
        if return_loss:
            losses = self._losses(outputs, labels)
            dynamic = (
                self.dynamic_rollout_loss_weight if dynamic_rollout_loss_weight is None else dynamic_rollout_loss_weight
            )
            decay = self.dynamic_loss_decay if dynamic_loss_decay is None else dynamic_loss_decay
            threshold = self.dynamic_loss_threshold if dynamic_loss_threshold is None else dynamic_loss_threshold
            total = self._total(losses, (decay, threshold) if dynamic else None)
            fields = {"loss": plus_aux_loss(total, mean_aux_loss(parts))}
            if return_loss_breakdown or return_all:
                fields["loss_breakdown"] = LossBreakdown(losses[0], losses[1:], losses)
        if return_all_pass_logits or return_all:
            fields["all_pass_logits"] = outputs
        return _named(fields)

    def _pass(
        self, ids: Tensor, record: LayerIntermediates | None, transition: Transition | None, kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, LayerIntermediates], Tensor | None]:
        """Run the model, with feedback of an earlier pass if there is one, and return its auxiliary loss, too."""
        feedback: dict[str, Any] = {}
        if record is not None:
            start, mask = kwargs.get("seq_start_pos"), kwargs.get("mask")
            transforms = self.make_transforms(record, self.training, transition, start=start, mask=mask)
            feedback["transform_block_inputs"] = transforms
        given = {"return_intermediates": True, "capture": STATES, **feedback, **kwargs}
        return run_with_aux_loss(self.net, ids, **given)

    def _losses(self, outputs: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
        """Return the loss of each pass; those with feedback do not count the first position, which has none."""
        model, counts = unwrapped(self.net), labels != self.ignore_index
        given: Any = {"ignore_index": self.ignore_index, "log_probs": model.output_is_log_prob}
        each = [token_losses(logits, labels, **given) for logits in outputs]
        first = 1 if labels.shape[1] > 1 else 0
        return [mean_over(each[0], counts), *(mean_over(t[:, first:], counts[:, first:]) for t in each[1:])]

    def _total(self, losses: Sequence[Tensor], dynamic: tuple[float, float] | None) -> Tensor:
        """Return the weighted loss of all passes; `dynamic` holds decay and threshold of dynamic weights."""
        total = losses[0]
        if len(losses) > 1:
            later = torch.stack(list(losses[1:]))
            weights = torch.ones_like(later)
            if dynamic is not None:
                weights = dynamic_rollout_loss_weights(torch.stack(list(losses)), *dynamic)[1:]
            mean = (weights * later).sum() / weights.sum().clamp(min=1e-8)
            total = total + self.feedback_pass_weight * mean
        model = unwrapped(self.net)
        return reaching(total, model.attn_pool, model.to_next_embed_pred, model.exit_norms, self.transitions)

    # generation

    @checked
    @passes_on("net")
    def generate(
        self,
        prompts: Ids | Sequence[Ids],
        seq_len: int,
        temperature: float = 1.0,
        filter_logits_fn: str | Callable[..., Tensor] = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        should_fuse_latent: Callable[[int], bool] | None = None,
        transition: Transition | None = None,
        temporal_parallel_passes: int | None = None,
        process_prompt: bool = True,
        eos_token: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue each prompt by at most `seq_len` tokens, in evaluation mode.

        Args:
            prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            temperature, filter_logits_fn, filter_kwargs: as in `AutoregressiveWrapper.generate`.
            should_fuse_latent: number of a step, from 0, to whether its token reads the states of the one before it.
            transition: instead of those of all routes: a function of latents and stream.
            temporal_parallel_passes: number of passes over the prompt; with 1 there is no feedback anywhere.
            process_prompt: else the prompt is read by one plain pass.
            eos_token: ends a row; 0s follow.
            kwargs: of the model's passes.

        Returns:
            The new tokens, `(..., m)`, m at most `seq_len`.

        Raises:
            InputError: with what was given and what is needed.
        """
        passes = self.temporal_parallel_passes if temporal_parallel_passes is None else temporal_parallel_passes
        _check_passes(passes, InputError)
        _check_transition(transition)
        _check_arguments(kwargs)
        net = unwrapped(self.net)
        if not net.can_cache_kv:
            raise InputError("each token is read once, with the keys of those before it, and `net` cannot cache keys.")
        check_length_and_end(seq_len, eos_token, net.num_tokens)
        options = GenerationOptions(
            temperature=temperature, filter_logits_fn=filter_logits_fn, filter_kwargs=filter_kwargs, arguments=kwargs
        )
        read = read_prompts(as_prompts(prompts, self, "`prompts`"), None, 0, net.num_tokens)
        _check_room(net, read.tokens.shape[1] + max(seq_len, 1) - 1)
        view = InferenceView(self)
        with torch.inference_mode(), view:
            own = view.of(self)
            sequences = Sequences(read.tokens, read.start)
            feedback = _Feedback(own, sequences, passes if process_prompt else 1, transition, passes > 1)
            feedback.should_fuse = should_fuse_latent
            feedback.reader = make_reader(unwrapped(own.net), read, seq_len, options, growing=feedback)
            decoding = Decoding(sequences, feedback.reader, options.choose, net.num_tokens)
            new = list(decoding.run(seq_len, eos_token, 0))
        # outside of inference mode: tokens that training may use
        tokens = cut_after_end(torch.cat([read.tokens[:, :0], *new], dim=-1), eos_token)
        return tokens.reshape(*read.lead, tokens.shape[1])


class _Feedback:
    """Arguments of the passes of a generation: what they capture, and what their blocks read of the pass before.

    Args:
        model: in evaluation mode.
        sequences: the tokens so far.
        passes: over the prompt.
        transition: instead of those of all routes, or None.
        fuses: new tokens read states of the token before them.
    """

    reader: Branching
    should_fuse: Callable[[int], bool] | None = None

    def __init__(
        self, model: FullBandwidth, sequences: Sequences, passes: int, transition: Transition | None, fuses: bool
    ) -> None:
        self.model, self.sequences, self.passes = model, sequences, passes
        self.transition, self.fuses, self.step = transition, fuses, 0

    def __call__(self, first: int, last: int, others: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pass over tokens `first` to `last`, which has others too."""
        before, start = self.reader.record, self.sequences.start_after(first)
        if before is None:
            tokens = self.sequences.tokens()[:, first:last]
            given = dict(others) if start is None else {**others, "seq_start_pos": start}
            for _ in range(self.passes - 1):
                (_, before), _ = self.model._pass(tokens, before, self.transition, given)
            transforms = self._transforms(before, generate=False, start=start, mask=others.get("mask"))
        else:
            fuses = self.fuses and (self.should_fuse is None or self.should_fuse(self.step))
            self.step += 1
            transforms = self._transforms(before if fuses else None, generate=True, mask=others.get("mask"))
        return {"capture": STATES, **transforms}

    def _transforms(self, record: LayerIntermediates | None, **given: Any) -> dict[str, Any]:
        if record is None:
            return {}
        transforms = self.model.make_transforms(record, override_transition=self.transition, **given)
        return {"transform_block_inputs": transforms}


def _seen_before(start: Tensor | None, mask: Tensor | None, count: int) -> Tensor | None:
    """Return `(b, count)` True where a token follows one that is visible, or None if padding is unknown."""
    seen = None if mask is None else F.pad(read_mask(mask, "mask")[:, :-1], (1, 0), value=False)
    if start is not None:
        after = torch.arange(count, device=start.device) > start.unsqueeze(-1)
        seen = after if seen is None else seen & after
    return seen


def _fuse_all(
    fuse: Callable[[Tensor, Tensor, Transition], Tensor],
    before: Tensor | None,
    routes: Sequence[tuple[Tensor, Transition]],
    stream: Tensor,
) -> Tensor:
    """Fuse the latents of all routes to a block into its input, in order.

    Args:
        fuse: of latents, stream and transition.
        before: `(b, n)` True for tokens whose predecessor is visible; others are left as they are. None for all.
        routes: latents `(b, n, d)` of tokens, and transitions.
        stream: `(b * s, columns, d)`, of which the last columns are the tokens.
    """
    for latents, transition in routes:
        streams = stream.shape[0] // max(latents.shape[0], 1)
        latents = latents.repeat_interleave(streams, dim=0) if streams > 1 else latents
        # a token that is new has the latent before it; otherwise both are the same tokens
        count = stream.shape[1] if fuse is fuse_last_latent else latents.shape[1]
        front, tokens = stream[:, : stream.shape[1] - count], stream[:, stream.shape[1] - count :]
        fused = fuse(latents, tokens, transition)
        if before is not None:
            seen = before.repeat_interleave(fused.shape[0] // max(before.shape[0], 1), dim=0)  # of each residual stream
            fused = torch.where(seen.unsqueeze(-1), fused, tokens)
        stream = torch.cat((front, fused), dim=1)
    return stream


def _merged(latents: Tensor, record: LayerIntermediates) -> Tensor:
    """Return `(b, n, d)` the mean of several residual streams `(b * s, n, d)`."""
    assert record.last_hidden is not None
    batch = record.last_hidden.shape[0]
    return latents if latents.shape[0] == batch else latents.unflatten(0, (batch, -1)).mean(dim=1)


def _named(fields: Mapping[str, Any]) -> Any:
    """Return the only value, or a named tuple of several."""
    if len(fields) == 1:
        return next(iter(fields.values()))
    return namedtuple("Outputs", fields)(**fields)


def _check_net(net: Any) -> TransformerWrapper:
    model = check_next_token_net(net)
    stack = model.attn_layers
    missing = []
    if not stack.causal:
        missing.append("a causal stack (a Decoder)")
    if not stack.config["options"].get("depth_scale_residual"):
        missing.append("`depth_scale_residual` in the stack")
    if not isinstance(model.to_logits, TiedLogits):
        missing.append("`tie_embedding = True`")
    if model.post_emb_norm is None:
        missing.append("`post_emb_norm = True`")
    if missing:
        raise ConfigError(f"`net` must have {', '.join(missing)}, so that states and embeddings have one scale.")
    if model.layout.every is not None:
        raise ConfigError(
            "memory tokens between tokens (`memory_tokens_interspersed_every`) have no position before them."
        )
    return model


def _check_passes(count: int, kind: type[Exception]) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise kind(f"`temporal_parallel_passes` is {count!r}; the tokens are read at least once.")


def _check_transition(transition: Any) -> None:
    if transition is not None and (not callable(transition) or isinstance(transition, type)):
        raise InputError(
            f"`transition` is {transition!r}; in a call it must be a function of latents and stream, since a name "
            "would mean new, untrained weights."
        )


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    taken = ("cache", "capture", "transform_token_embeds", "transform_block_inputs", "logits_to_keep", "prepend_embeds")
    for name in kwargs:
        if name.startswith("return_") or name in taken:
            raise InputError(f"`{name}` cannot be given to passes with feedback; call the net itself.")


def _check_room(net: TransformerWrapper, total: int) -> None:
    most = net.max_seq_len
    if 0 < most < total and not net.can_cache_kv_outside_max_seq_len:
        raise InputError(
            f"{total} tokens (prompt and generated) exceed `max_seq_len` = {most}, and there are no absolute positions "
            "beyond. Generate less, or build the model with rotary positions."
        )


def _checked_ids(token_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    ids = token_ids.long()
    _check_arguments(kwargs)
    if ids.shape[1] == 0:
        raise ShapeError(f"`token_ids` has shape {tuple(ids.shape)}; there is no token to read.")
    return ids
