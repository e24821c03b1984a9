"""Next-token training and generation in segments, each of which remembers the one before (Transformer-XL, 1901.02860).

A sequence is cut into segments of `max_seq_len` tokens, counted from its first one. Segment s reads the memory that the
segments before it left, `mems_s`; generation fills the last segment, and once that is complete its memory joins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.decoding.generation import Generation
from x_transformers.decoding.generation_inputs import Arguments, check_length_and_end, cut_arguments
from x_transformers.decoding.loop import Decoding, check_next_token_net, in_shape, streamed
from x_transformers.decoding.options import GenerationOptions, takes_options
from x_transformers.decoding.prompts import read_prompts
from x_transformers.decoding.step import Reader, Sequences
from x_transformers.errors import ConfigError, InputError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_prompts
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import plus_aux_loss, reaching, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.memory_layout import interspersed
from x_transformers.models.next_item import check_hides_future, check_predicts
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.frames import of_any_length, skipped, without_graphs
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32, pad_left
from x_transformers.options.values import accepts, shown
from x_transformers.test_time.adaptation import Adaptation, InnerLoss, ordinary, with_gradients
from x_transformers.test_time.episodic import EpisodicMemories, EpisodicMemoryWrapper
from x_transformers.test_time.inner_losses import TTTMetaLearningTargetKLLoss, TTTNextLatentPredictionLoss
from x_transformers.test_time.places import Pair, adapt_places, get_module_by_path, set_module_by_path
from x_transformers.test_time.row_weights import LowRankLinear, TTTModuleWrapper
from x_transformers.test_time.steps import Descent, newtonschulz5

__getattr__ = names_of(__name__)

__all__ = [
    "EpisodicMemories",
    "EpisodicMemoryWrapper",
    "LowRankLinear",
    "TTTMetaLearningTargetKLLoss",
    "TTTModuleWrapper",
    "TTTNextLatentPredictionLoss",
    "XLAutoregressiveWrapper",
    "get_module_by_path",
    "newtonschulz5",
    "set_module_by_path",
]

Memories = Sequence[Tensor | None]


class XLAutoregressiveWrapper(SavesFolders):
    """Training and generation in segments, with recurrent memory between them.

    Args:
        net: the model; its `max_seq_len` is the length of a segment, its `max_mem_len` that of the memory.
        ignore_index: label that does not count in the loss.
        pad_value: id that replaces `ignore_index` in the input, and fills rows that have ended.
        tbptt_steps: number of segments through whose memory gradients flow before they are cut.
        ttt_module_paths: modules of the net whose weights each row adapts after every segment, by their paths, such as
            "attn_layers.layers.1.1.ff.2"; a pair `(source, target)` updates the target by gradients of the source.
        ttt_lr, ttt_wd: step size and decay of these steps.
        ttt_use_muon: orthogonalize gradients of matrices.
        ttt_muon_steps, ttt_muon_lr: number of iterations that do so, and the step size for such gradients.
        ttt_low_rank_paths: pairs of the path of a linear map and a rank: its matrix is replaced by one of this rank,
            and is adapted.
        ttt_custom_loss_module: loss of the steps instead of that of the next token: a module of the record of a pass
            and a mask `(b, n)` of the labels that count, which returns `(b, n)` or `(b,)`.
        ttt_next_latent_loss: use `TTTNextLatentPredictionLoss`.
        episodic_mem_len: number of learned keys and values that every self-attention sees besides the others. They are
            adapted too if the path "episodic_mems" is among those above.

    Raises:
        ConfigError: if the model has no segment length, several heads or none, or an option is out of range; naming a
            path that does not lead to a module which can be adapted.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        ignore_index: int = -100,
        pad_value: int = 0,
        tbptt_steps: int = 1,
        ttt_module_paths: Sequence[str | Sequence[str]] = (),
        ttt_lr: float = 1e-3,
        ttt_wd: float = 0.01,
        ttt_use_muon: bool = False,
        ttt_muon_steps: int = 5,
        ttt_muon_lr: float = 0.01,
        ttt_low_rank_paths: Sequence[tuple[str, int]] = (),
        ttt_custom_loss_module: nn.Module | None = None,
        ttt_next_latent_loss: bool = False,
        episodic_mem_len: int = 0,
    ) -> None:
        super().__init__()
        model = check_next_token_net(net)
        if model.max_seq_len < 1:
            raise ConfigError(
                f"`max_seq_len` of `net` is {model.max_seq_len}; it is the length of a segment, at least 1."
            )
        if isinstance(tbptt_steps, bool) or not isinstance(tbptt_steps, int) or tbptt_steps < 1:
            raise ConfigError(f"`tbptt_steps` is {tbptt_steps!r}; it counts segments, a whole number, at least 1.")
        descent = Descent(lr=ttt_lr, wd=ttt_wd, use_muon=ttt_use_muon, muon_steps=ttt_muon_steps, muon_lr=ttt_muon_lr)
        adapts = bool(ttt_module_paths or ttt_low_rank_paths)
        _check_adaptation(net, tbptt_steps, adapts, ttt_custom_loss_module, ttt_next_latent_loss, descent)
        self.ignore_index, self.pad_value, self.tbptt_steps = ignore_index, pad_value, tbptt_steps
        self.net = cast(TransformerWrapper, EpisodicMemoryWrapper(net, episodic_mem_len)) if episodic_mem_len else net
        pairs = adapt_places(self.net, ttt_module_paths, ttt_low_rank_paths)
        if ttt_next_latent_loss:
            ttt_custom_loss_module = TTTNextLatentPredictionLoss(dim=model.attn_layers.dim)
        self.ttt_custom_loss_module = ttt_custom_loss_module
        names = {each: name for name, each in self.net.named_modules(remove_duplicate=False)}
        self._descent, self._adapted = descent, tuple((names[pair.source], names[pair.target]) for pair in pairs)

    @property
    def max_seq_len(self) -> int:
        """Length of a segment."""
        return unwrapped(self.net).max_seq_len

    @property
    def has_ttt(self) -> bool:
        """True if rows adapt weights at test time."""
        return bool(self._adapted)

    @property
    def _adaptation(self) -> Adaptation:
        # the modules of this object: replicas have their own
        pairs = [Pair(*map(self.net.get_submodule, names)) for names in self._adapted]  # type: ignore[arg-type]
        return Adaptation(pairs, self._descent, self._inner_loss(self.ttt_custom_loss_module))

    def _inner_loss(self, custom: nn.Module | None) -> InnerLoss:
        return InnerLoss(custom, self.ignore_index, unwrapped(self.net).output_is_log_prob)

    @checked
    def init_ttt(self, batch: int) -> None:
        """Give each row its own copy of the weights that it adapts, which calls of the net then use.

        `forward` and `generate` do this themselves. `TTTModuleWrapper.reset_all(wrapper)` ends it.

        Args:
            batch: number of rows.

        Raises:
            InputError: if there are no weights to adapt, or no rows.
        """
        if not self.has_ttt:
            raise InputError("no weights are adapted at test time; give `ttt_module_paths` or `ttt_low_rank_paths`.")
        if batch < 1:
            raise InputError(f"`batch` is {batch}; it is a number of rows, at least 1.")
        self._adaptation.begin(batch)

    @checked
    def update_ttt(
        self,
        logits: Tensor,
        chunk_labels: Tensor,
        create_graph: bool = False,
        intermediates: LayerIntermediates | None = None,
    ) -> None:
        """Let each row take one step on the weights that it adapts.

        Args:
            logits: `(b, n, v)` of a pass of the net after `init_ttt`, with gradients.
            chunk_labels: `(b, n)`.
            create_graph: keep the step differentiable; otherwise the new weights are constants.
            intermediates: record of the pass, which a custom loss reads.

        Raises:
            InputError: without `init_ttt`, or without a record that the loss needs.
        """
        labels = checked_ids(chunk_labels, self).long()
        if logits.ndim != 3 or logits.shape[:2] != labels.shape or not logits.is_floating_point():
            raise InputError(
                f"`logits` has shape {tuple(logits.shape)} and dtype {logits.dtype}, and `chunk_labels` shape "
                f"{tuple(labels.shape)}; they must be (b, n, v), floating, and (b, n)."
            )
        self._adaptation.update(logits, labels, intermediates, create_graph)

    @skipped
    @passes_on("net")
    def forward(
        self,
        x: Ids,
        mems: Memories | None = None,
        dropout_mems: bool = False,
        ttt_recurrent_steps: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss, `sum_c n_c / N * mean_b (mean over the valid targets of row b in segment c)`.

        Segment c has `n_c` of the N targets. All rows have the same weight; one without a valid target counts as 0.

        Args:
            x: `(b, n)` ids; `ignore_index` where a token is neither shown nor predicted.
            mems: what an earlier pass of the model left as its memory.
            dropout_mems: read no memory at all.
            ttt_recurrent_steps: number of times that a segment is read, each with a step on adapted weights; the last
                time counts.
            kwargs: of the model's passes. Arguments over tokens (`mask`, `self_attn_kv_mask`, `pos`, `sum_embeds`,
                `embed_ids`) are cut as the tokens are; masked tokens stay hidden in the memory.

        Returns:
            A scalar; zero, attached to the graph, if there is no valid target.

        Raises:
            InputError: with what was given and what is needed.
        """
        if self._adapted or ttt_recurrent_steps != 1:
            # graphs cannot contain gradients, and are differentiated once
            return without_graphs(self._adapting, x, mems, dropout_mems, ttt_recurrent_steps, kwargs)
        segments = without_graphs(self._segments, x, mems=mems, dropout_mems=dropout_mems, **kwargs)
        loss = 0.0
        segment = without_graphs(segments.first)
        # whatever is called here, a graph or not, is called once for each segment
        while segment is not None:
            each, left = self._read(segment.tokens, segment.labels, segment.detach, **segment.arguments)
            loss = loss + each * segment.share
            segment = without_graphs(segments.after, segment, left)
        return without_graphs(self._reaching, loss)

    def _adapting(
        self, x: Ids, mems: Memories | None, dropout_mems: bool, recurrent_steps: int, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Compute the loss, with a step on adapted weights after each segment; see `forward`."""
        if not self.has_ttt:
            raise InputError("`ttt_recurrent_steps` repeats steps on adapted weights; give `ttt_module_paths`.")
        if not accepts(int, recurrent_steps) or recurrent_steps < 1:
            raise InputError(f"`ttt_recurrent_steps` is {shown(recurrent_steps)}; it is a number of times, at least 1.")
        differentiable, adaptation = torch.is_grad_enabled(), self._adaptation
        loss: Any = 0.0
        with with_gradients():
            x, mems, kwargs = ordinary(x), ordinary(mems), ordinary(kwargs)
            segments = self._segments(x, mems=mems, dropout_mems=dropout_mems, **kwargs)
            segment = segments.first()
            try:
                adaptation.begin(segment.tokens.shape[0])
                while segment is not None:
                    each, left = self._read_and_adapt(
                        adaptation, segment, recurrent_steps, segments.is_last, differentiable
                    )
                    loss = loss + each * segment.share
                    segment = segments.after(segment, left)
            finally:
                adaptation.end()
            loss = self._reaching(loss)
        return loss if differentiable else loss.detach()

    def _read_and_adapt(
        self, adaptation: Adaptation, segment: _Segment, times: int, is_last: bool, differentiable: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Read one segment a number of times, with a step after each but the very last one.

        Returns:
            The loss of the last time, and the memory that it leaves.
        """
        create_graph = self.training and differentiable
        given = {"return_mems": True, "return_intermediates": True, "detach_mems": segment.detach, **segment.arguments}
        (logits, record), aux = run_with_aux_loss(self.net, segment.tokens, **given)
        for _ in range(times - 1):
            adaptation.update(logits, segment.labels, record, create_graph)
            (logits, record), aux = run_with_aux_loss(self.net, segment.tokens, **given)
        if not is_last:
            adaptation.update(logits, segment.labels, record, create_graph)
        if segment.detach:
            adaptation.detach()
        each = plus_aux_loss(self._segment_loss(logits, segment.labels), aux)
        return (each if differentiable else each.detach()), record.mems

    @checked
    @passes_on("net")
    def _segments(self, x: Ids, mems: Memories | None = None, dropout_mems: bool = False, **kwargs: Any) -> _Segments:
        """Check the arguments of `forward`, and return the segments of x."""
        x = checked_ids(x, self).long()  # bytes could not hold `ignore_index`
        check_predicts(x)
        check_hides_future(self.net, kwargs)
        shown = x.masked_fill(x == self.ignore_index, self.pad_value)
        memory = None if dropout_mems else _Memory(self.net, mems)
        return _Segments(shown, x[:, 1:], kwargs, memory, self.max_seq_len, self.tbptt_steps)

    @checked
    @passes_on("net")
    def _read(
        self, tokens: Tensor, labels: Tensor, detach: bool, mems: Memories | None = None, **arguments: Any
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss of one segment, and the memory that it leaves."""
        arguments = {"return_mems": True, "detach_mems": detach, "mems": mems, **arguments}
        (logits, left), aux = run_with_aux_loss(self.net, tokens, **arguments)
        return plus_aux_loss(self._segment_loss(logits, labels), aux), left

    def _reaching(self, loss: Tensor) -> Tensor:
        """Return the loss with gradients for the heads that it does not read."""
        model = unwrapped(self.net)
        return reaching(loss, model.attn_pool, model.to_next_embed_pred, model.exit_norms, self.ttt_custom_loss_module)

    def _segment_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        normalized = unwrapped(self.net).output_is_log_prob
        each = token_losses(logits, labels, ignore_index=self.ignore_index, log_probs=normalized)
        counts = (labels != self.ignore_index).sum(dim=-1).clamp(min=1)
        return (at_least_float32(each).sum(dim=-1) / counts).mean()

    @takes_options("eos_token temperature filter_logits_fn filter_kwargs mems * cache_kv filter_before_temperature")
    @passes_on("net")
    def generate(
        self, start_tokens: Ids, seq_len: int, options: GenerationOptions, mems: Memories | None = None
    ) -> Tensor:
        """Continue each prompt by at most `seq_len` tokens, in evaluation mode.

        Every token is drawn from what `forward` expects at its place: with the memory of all complete segments before.

        Args:
            start_tokens: `(..., n)` ids, any number of segments long.
            seq_len: number of tokens to generate.
            mems: memory to begin with.
            [options]
            kwargs: of the model's passes. Masks cover the prompts; `pos`, `sum_embeds` and `embed_ids` cover prompts
                and generated tokens (`embed_ids` may be functions of the ids so far).

        Returns:
            The new tokens, `(..., m)`, m at most `seq_len`.

        Raises:
            InputError: with what was given and what is needed.
        """
        generation = self._begin(start_tokens, seq_len, mems, options)
        with torch.inference_mode(), generation.view:
            new = list(self._steps(generation, seq_len))
        return generation.join(new)

    @takes_options("eos_token * temperature filter_logits_fn filter_kwargs mems cache_kv filter_before_temperature")
    @passes_on("net")
    def stream(
        self, start_tokens: Ids, seq_len: int, options: GenerationOptions, mems: Memories | None = None
    ) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, `(...)` each, as they come.

        Args:
            start_tokens: `(..., n)` ids, any number of segments long.
            seq_len: number of tokens to generate.
            mems: memory to begin with.
            [options]
            kwargs: of the model's passes, as in `generate`.

        Returns:
            An iterator over tensors of ids, one for each step.

        Raises:
            InputError: at once, with what was given and what is needed.
        """
        generation = self._begin(start_tokens, seq_len, mems, options)
        return streamed(partial(self._steps, generation, seq_len), in_shape(generation.prompts.lead), generation.view)

    @staticmethod
    def _steps(generation: Generation, seq_len: int) -> Iterator[Tensor]:
        """Yield the steps; afterwards, also after an error, no row has weights of its own."""
        reader = generation.decoding.expert
        assert isinstance(reader, _InSegments)
        try:
            yield from generation.steps(seq_len)
        finally:
            if reader.adaptation is not None:
                reader.adaptation.end()

    def _begin(self, start_tokens: Ids, seq_len: int, mems: Memories | None, options: GenerationOptions) -> Generation:
        net = unwrapped(self.net)
        check_length_and_end(seq_len, options.eos_token, net.num_tokens)
        read = read_prompts(as_prompts(start_tokens, net, "`start_tokens`"), None, self.pad_value, net.num_tokens)
        if read.start is not None:
            raise InputError(
                "the prompts have different lengths, so their segments would begin at different columns; generate "
                "from one length at a time."
            )
        _refuse(options.arguments)
        arguments = Arguments(options.arguments, read.width, read.tokens.shape[1] + max(seq_len, 1) - 1)
        custom = self.ttt_custom_loss_module
        view = InferenceView(net, *(() if custom is None else (custom,)))
        adaptation = None
        if self.has_ttt:
            own = self._adaptation
            loss = self._inner_loss(None if custom is None else view.of(custom))
            adaptation = Adaptation(own.pairs, own.descent, loss, view.of)
        reader = _InSegments(view.of(net), arguments, mems, options.cache_kv and net.can_cache_kv, adaptation)
        decoding = Decoding(Sequences(read.tokens), reader, options.choose, net.num_tokens)
        return Generation(decoding, read, view, options, self.pad_value)


class _Segment(NamedTuple):
    """One segment of a batch.

    Attributes:
        tokens: `(b, n)`.
        labels: `(b, n)`.
        arguments: of the pass, with the memory that it reads.
        detach: stop gradients at the memory that it leaves.
        share: of its loss in that of the batch.
    """

    tokens: Tensor
    labels: Tensor
    arguments: dict[str, Any]
    detach: bool
    share: float


class _Segments:
    """The segments of a batch, one after the other.

    Args:
        shown: `(b, n)` tokens.
        labels: `(b, n - 1)`.
        kwargs: of the model's passes, over n tokens.
        memory: to begin with; None if no segment reads any.
        size: length of a segment.
        tbptt_steps: number of segments within which gradients flow through memory, and not beyond.
    """

    def __init__(
        self,
        shown: Tensor,
        labels: Tensor,
        kwargs: Mapping[str, Any],
        memory: _Memory | None,
        size: int,
        tbptt_steps: int,
    ) -> None:
        self.shown, self.labels, self.kwargs, self.memory = shown, labels, kwargs, memory
        self.size, self.tbptt_steps = size, tbptt_steps
        self.number = self.begin = 0

    @property
    def is_last(self) -> bool:
        """True if no segment follows the present one."""
        return self.begin + self.size >= self.labels.shape[1]

    def first(self) -> _Segment:
        """Return the first segment."""
        return self._next()

    def after(self, segment: _Segment, mems: Sequence[Tensor | None]) -> _Segment | None:
        """Return the segment after one that has been read and left `mems`, or None after the last one."""
        if self.memory is not None:
            self.memory.join(segment.tokens, segment.arguments, mems)
        self.number, self.begin = self.number + 1, self.begin + self.size
        # `range` would make the length a number of a graph; comparisons leave it a symbol
        return self._next() if self.begin < self.labels.shape[1] else None

    def _next(self) -> _Segment:
        total = self.labels.shape[1]
        begin, end = self.begin, min(self.begin + self.size, total)
        arguments = of_any_length(_of_segment(self.kwargs, begin, end, self.shown.shape[1]), end - begin)
        if self.memory is not None:
            arguments = {**arguments, **of_any_length(self.memory.arguments(), self.memory.length)}
        return _Segment(
            of_any_length(self.shown[:, begin:end], end - begin),
            of_any_length(self.labels[:, begin:end], end - begin),
            arguments,
            (self.number + 1) % self.tbptt_steps == 0,
            # the last segment may be shorter, and counts by its length
            (end - begin) / total,
        )


class _Memory:
    """Memory that the segments so far have left, and its mask.

    Args:
        net: the model.
        mems: memory to begin with.
    """

    def __init__(self, net: TransformerWrapper, mems: Memories | None) -> None:
        self.net = net
        if mems is not None and not accepts(Memories, mems):
            raise InputError(f"`mems` is {shown(mems)}; it must be a list of tensors, as an earlier call returned it.")
        self.mems: list[Tensor | None] | None = None if mems is None else list(mems)
        self.seen: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a pass that reads it."""
        masks = None if self.seen is None or self.mems is None else [self.seen] * len(self.mems)
        return {"mems": self.mems, "mem_masks": masks}

    @property
    def length(self) -> int:
        """Number of remembered slots."""
        # the compiler of PyTorch 2.6 knows no default of `next`
        for t in self.mems or ():
            if t is not None:
                return t.shape[-2]
        return 0

    def read(self, segment: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return logits `(b, n, v)` of a whole segment, which joins the memory."""
        logits, mems = self.net(segment, return_mems=True, **self.arguments(), **arguments)
        self.join(segment, arguments, mems)
        return logits

    def join(self, segment: Tensor, arguments: Mapping[str, Any], mems: Sequence[Tensor | None]) -> None:
        """Remember what a pass over a segment left, and the segment's mask."""
        self._remember_mask(segment, arguments)
        self.mems = list(mems)

    def _remember_mask(self, segment: Tensor, arguments: Mapping[str, Any]) -> None:
        """Append the segment's mask: masked tokens stay masked in its memory."""
        masks = [arguments[name].bool() for name in ("mask", "self_attn_kv_mask") if arguments.get(name) is not None]
        if not masks and self.seen is None:
            return
        batch, n = segment.shape
        new = torch.ones(batch, n, dtype=torch.bool, device=segment.device)
        for mask in masks:
            new = new & mask
        net = unwrapped(self.net)
        layout = net.layout
        # memory tokens of the model have slots in each segment, and so in the recurrent memory
        if layout.every is None:
            new = pad_left(new, layout.memory, True)
        else:
            new = interspersed(layout, n, 0, 0, None, segment.device).spread(new, True)
        # memory from before the first mask is visible as a whole
        if self.length > 0:
            seen = self.seen if self.seen is not None else new.new_ones(batch, self.length)
            new = torch.cat((seen, new), dim=-1)
        self.seen = new[:, max(new.shape[1] - net.max_mem_len, 0) :]


class _InSegments(Reader):
    """Reads a growing sequence in segments: complete ones at once, the last one token by token.

    Args:
        net: the model.
        arguments: of its passes.
        mems: memory to begin with.
        caching: keep keys and values of the segment that is not complete.
        adaptation: the weights that rows adapt to the prompt, or None.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        arguments: Arguments,
        mems: Memories | None,
        caching: bool,
        adaptation: Adaptation | None = None,
    ) -> None:
        self.net, self.arguments, self.caching, self.record = net, arguments, caching, None
        self.adaptation, self.adapted = adaptation, False
        self.memory = _Memory(net, mems)
        self.cache = KVCache()
        self.first = self.length = 0

    def read(self, sequences: Sequences) -> Tensor:
        logits: Tensor | None = None
        size, tokens = self.net.max_seq_len, sequences.tokens()
        if self.adaptation is not None and not self.adapted:
            self.adapted = True
            with with_gradients():
                self._adapt(ordinary(tokens), self.adaptation)
        while sequences.length - self.first >= size:
            # also one whose tokens were read one by one: this pass leaves the memory that `forward` would have
            last = self.first + size
            arguments = self._at(last, tokens, size)
            logits = self.memory.read(tokens[:, self.first : last], arguments)
            self.first = self.length = last
            self.cache = KVCache()
        if sequences.length > self.first:
            logits = self._read_rest(sequences.length, tokens)
        assert logits is not None
        return logits

    def _adapt(self, prompt: Tensor, adaptation: Adaptation) -> None:
        """Let the rows adapt to the prompt, segment by segment as in `forward`.

        Complete segments leave their memory. The last, incomplete one is read again when tokens are drawn, and must not
        be in its own memory then.
        """
        size, total = self.net.max_seq_len, prompt.shape[1] - 1
        adaptation.begin(prompt.shape[0], evaluate=True)
        self.memory.mems = ordinary(self.memory.mems)
        while self.first < total:
            last = min(self.first + size, total)
            arguments = ordinary(self._at(last, prompt, last - self.first))
            logits, record = self.net(
                prompt[:, self.first : last],
                return_mems=True,
                return_intermediates=True,
                **self.memory.arguments(),
                **arguments,
            )
            adaptation.update(logits, prompt[:, self.first + 1 : last + 1], record)
            if last - self.first < size:
                break
            self.memory.join(prompt[:, self.first : last], arguments, record.mems)
            self.first = self.length = last

    def _read_rest(self, length: int, tokens: Tensor) -> Tensor:
        """Read the incomplete last segment."""
        begin = self.length if self.caching else self.first
        self.length = length
        arguments = {**self._at(length, tokens, length - begin), **self.memory.arguments()}
        new = tokens[:, begin:length]
        if not self.caching:
            return self.net(new, **arguments)
        logits, record = self.net(
            new, cache=self.cache, input_not_include_cache=True, return_intermediates=True, **arguments
        )
        self.record, self.cache = record, record.cache
        return logits

    def _at(self, length: int, tokens: Tensor, new: int) -> dict[str, Any]:
        return self.arguments.at(length, lambda: tokens[:, :length], first=self.first, new=new)


_REFUSED = {
    "prepend_embeds": "it would be in front of every segment; read it with the net, and pass its memory as `mems`",
    "prepend_mask": "there are no prepended embeddings",
    "mem_masks": "the memory's masks come from `mask`",
    "return_mems": "call the net itself",
    "detach_mems": "see `tbptt_steps`",
    "cache": "segments are cached here",
    "attn_mask": "it covers one segment; give `mask` or `self_attn_kv_mask`",
    "attn_bias": "it covers one segment; build a position bias into the stack",
    "seq_start_pos": "padding on the left would move the segments; pad on the right",
    "deep_embeds_and_ids": "it covers one segment; build the model with `ff_deep_embed`",
    "self_attn_kv_residuals": "it covers one segment",
}


def _refuse(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in _REFUSED or name.startswith("return_"):
            raise InputError(f"`{name}` cannot be given to segments: {_REFUSED.get(name, 'call the net itself')}.")


def _check_adaptation(
    net: TransformerWrapper,
    tbptt_steps: int,
    adapts: bool,
    custom: nn.Module | None,
    next_latent: bool,
    descent: Descent,
) -> None:
    """Check the options of test-time training against each other, and the model against them."""
    if custom is not None and next_latent:
        raise ConfigError("`ttt_next_latent_loss` and `ttt_custom_loss_module` are both losses of a step; give one.")
    if not adapts:
        if custom is not None or next_latent or descent.use_muon:
            raise ConfigError(
                "`ttt_use_muon`, `ttt_custom_loss_module` and `ttt_next_latent_loss` are about steps on adapted "
                "weights, of which there are none; give `ttt_module_paths` or `ttt_low_rank_paths`."
            )
        return
    if tbptt_steps < 2:
        raise ConfigError(
            f"`tbptt_steps` is {tbptt_steps}; steps on adapted weights act on the segments after them, so that "
            "gradients must flow through at least 2."
        )
    model = unwrapped(net)
    if model is not net:
        raise ConfigError(
            f"`net` is wrapped, as a {type(net).__name__}; steps on adapted weights are differentiated through, which "
            "is not possible there. Give the model itself, and wrap the `XLAutoregressiveWrapper`."
        )
    if model.attn_layers.checkpoint_every is not None:
        raise ConfigError(
            "`checkpoint_every` runs blocks again for their gradients, when the weights that rows have adapted are "
            "others; build the stack without it."
        )


def _of_segment(kwargs: Mapping[str, Any], first: int, last: int, n: int) -> dict[str, Any]:
    """The arguments of the pass over tokens `first` to `last` of n."""
    _refuse(kwargs)
    return cut_arguments(kwargs, first, last, n)
