"""The loop: read, contrast, choose, append; until the length or the end token is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from x_transformers.decoding.caches import first_cache, window_of
from x_transformers.decoding.compiled import CompiledReading
from x_transformers.decoding.filters import contrastive_decode_fn
from x_transformers.decoding.generation_inputs import Arguments, Growing
from x_transformers.decoding.options import GenerationOptions
from x_transformers.decoding.prompts import Prompts
from x_transformers.decoding.recorded import RecordedStep, Recorder
from x_transformers.decoding.sampling import Choose, check_keywords, check_readable
from x_transformers.decoding.step import Branching, Cached, Reader, Rerun, Sequences
from x_transformers.decoding.watch import Watch
from x_transformers.errors import ConfigError, InputError
from x_transformers.models.base import Model
from x_transformers.models.delegate import ModelDelegate
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.values import accepts, shown

Each = TypeVar("Each")
Shown = TypeVar("Shown")

Contrast = Callable[[Tensor, Tensor], Tensor]
"""Logits of the expert and of an amateur to new ones."""


class Decoding:
    """A batch that is being continued.

    Args:
        sequences: the tokens so far.
        expert: whose expectations count.
        amateurs: readers of weaker models, each with the function that contrasts the expert's logits with its own.
        choose: logits `(b, v)` to tokens `(b, 1)`.
        vocabulary: number of ids that can be read again.
    """

    def __init__(
        self,
        sequences: Sequences,
        expert: Reader,
        choose: Choose,
        vocabulary: int,
        amateurs: Sequence[tuple[Reader, Contrast]] = (),
    ) -> None:
        self.sequences, self.expert, self.amateurs = sequences, expert, amateurs
        self.choose, self.vocabulary, self.watch = choose, vocabulary, Watch()

    def step(self) -> Tensor:
        """Choose and append the next tokens, `(b, 1)`."""
        logits = self.expert.read(self.sequences)[:, -1]
        if logits.shape[-1] > self.vocabulary:
            check_readable(logits, self.vocabulary)
        self.watch.note(logits)
        for amateur, contrast in self.amateurs:
            other = amateur.read(self.sequences)[:, -1]
            self.watch.note(other, "an amateur")
            logits = contrast(logits, other)
        token = self.choose(logits)
        self.sequences.append(token)
        return token

    def expect(self, readers: Sequence[Branching], last: int) -> Tensor:
        """Return contrasted logits `(b, last, v)` after the newest tokens.

        Args:
            readers: of the expert and the amateurs.
            last: number of positions.
        """
        logits, *others = [reader.read(self.sequences, last)[:, -last:] for reader in readers]
        check_readable(logits, self.vocabulary)
        self.watch.note(logits)
        for other, (_, contrast) in zip(others, self.amateurs, strict=True):
            self.watch.note(other, "an amateur")
            logits = contrast(logits, other)
        return logits

    def run(self, seq_len: int, eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
        """Return an iterator over at most `seq_len` steps, `(b, 1)` tokens each; see `until_ended`."""
        yield from until_ended((self.step() for _ in range(seq_len)), eos_token, pad_value, every)
        self.watch.look()


def until_ended(steps: Iterator[Tensor], eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
    """Yield generated tokens `(b, 1)` until every row has ended; after a row's end token come `pad_value`s.

    Args:
        steps: the tokens.
        eos_token: ends a row; None for rows that never end.
        pad_value: what follows it.
        every: number of steps between checks whether all rows have ended, each of which waits for the device; 0 never
            checks.
    """
    done: Tensor | None = None
    for count, token in enumerate(steps, start=1):
        if eos_token is None:
            yield token
            continue
        ends = token == eos_token
        # `done` is from the step before: the end token itself is kept
        yield token if done is None else token.masked_fill(done, pad_value)
        done = ends if done is None else done | ends
        if every and count % every == 0 and bool(done.all()):
            return


def cut_after_end(tokens: Tensor, eos_token: int | None) -> Tensor:
    """Cut `(b, m)` generated tokens after the column in which the last row ends."""
    if eos_token is None or tokens.shape[1] == 0:
        return tokens
    going = ((tokens == eos_token).cumsum(dim=1) == 0).any(dim=0)
    return tokens[:, : int(going.sum()) + 1]


def make_reader(
    net: Model,
    prompts: Prompts,
    seq_len: int,
    options: GenerationOptions,
    *,
    compiled: CompiledReading | None = None,
    recorder: Recorder | None = None,
    growing: Growing | None = None,
) -> Branching:
    """Return a reader of the prompts and of what follows them.

    Args:
        net: the model.
        prompts: what it begins with.
        seq_len: number of tokens that follow; the last one is not read.
        options: of which `cache`, `cache_kv`, `restrict_to_max_seq_len`, `guesses`, `early_exit` and `arguments` matter
            here.
        compiled: how a static cache reads tokens, if not by ordinary passes.
        recorder: records the steps over a static cache, for readers that read one token at a time.
        growing: arguments that grow with the sequence; see `Arguments`.

    Raises:
        InputError: if the cache, the length, the arguments, the step and the model do not fit each other.
    """
    total = prompts.tokens.shape[1] + max(seq_len, 1) - 1
    align = None if prompts.lens is None else partial(prompts.align, value=False)
    arguments = Arguments(options.arguments, prompts.width, total, align, growing)
    if options.early_exit is not None:
        arguments.constant["early_exit"] = options.early_exit
    caching, cache = options.cache_kv and net.can_cache_kv, options.cache
    if compiled is not None and isinstance(cache, str) and cache == "dynamic":
        cache = "static"
    if not caching and cache != "dynamic":
        why = "only a causal model can use one" if options.cache_kv else "`cache_kv = False` switches it off"
        raise InputError(f"a particular cache is requested (by `cache` or `compile`), but {why}; drop one of them.")
    if compiled is not None and net.layout.every is not None:
        raise InputError(
            "interspersed memory tokens make steps of different lengths, which cannot be compiled; drop `compile`."
        )
    window = window_of(net, total, caching=caching, restrict=options.restrict_to_max_seq_len)
    if not caching:
        return Rerun(net, arguments, window)
    kv, held = first_cache(net, prompts, total, options, cache, window)
    first = prefill = None
    if compiled is not None:
        if kv.capacity is None:
            raise InputError(
                "steps compile over a static cache, and the one given is dynamic; drop `compile`, or `cache`."
            )
        first, prefill = compiled.step.first, compiled.prefill if options.compile_prefill else None
    if recorder is not None and kv.capacity is not None:
        first = RecordedStep(recorder, first).first
    return Cached(net, arguments, kv, held, window, first, prefill)


def pair_amateurs(
    amateurs: Sequence[nn.Module], kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]], vocabulary: int
) -> list[tuple[TransformerWrapper, Contrast]]:
    """Return the amateurs, each with its contrast; one set of keywords serves all of them.

    Raises:
        InputError: if the numbers differ, or an amateur is no model of the same vocabulary.
    """
    contrasts = [kwargs] * len(amateurs) if isinstance(kwargs, Mapping) else list(kwargs)
    if len(contrasts) != len(amateurs):
        raise InputError(
            f"there are {len(amateurs)} amateurs and {len(contrasts)} `contrastive_decode_kwargs`; give one for all, "
            "or one for each."
        )
    pairs: list[tuple[TransformerWrapper, Contrast]] = []
    for net, contrast in zip(amateurs, contrasts, strict=True):
        net = same_vocabulary(net, vocabulary, "an amateur")
        check_keywords(contrastive_decode_fn, contrast, "contrastive_decode_kwargs", arguments=2)
        for name in ("alpha", "beta"):
            if not accepts(float, contrast.get(name, 0.0)):
                raise InputError(f"`{name}` is {shown(contrast[name])}; it must be a finite number.")
        pairs.append((net, partial(contrastive_decode_fn, **contrast)))
    return pairs


def check_next_token_net(net: Any) -> TransformerWrapper:
    """Return the model, without what PyTorch put around it, if it returns logits for each token, by a single head.

    Raises:
        ConfigError: if it does not.
    """
    net = unwrapped(net)
    if not isinstance(net, TransformerWrapper | ModelDelegate):
        raise ConfigError(f"`net` is a {type(net).__name__}; it must be a TransformerWrapper around a stack.")
    if net.has_multiple_heads or net.to_logits is None:
        heads = "several heads (`num_output_heads`)" if net.has_multiple_heads else "no head (`return_only_embed`)"
        raise ConfigError(f"`net` has {heads}; predicting the next token needs exactly one.")
    if net.pools or net.returns_pooled:
        raise ConfigError(
            "`net` pools its sequence (class tokens, `average_pool_embed` or `attn_pool`), and so has no logits for "
            "each token; build it without."
        )
    return cast(TransformerWrapper, net)


def same_vocabulary(net: nn.Module, vocabulary: int, what: str) -> TransformerWrapper:
    """Return the model, if it is one of the same vocabulary.

    Raises:
        InputError: if it is not.
    """
    net = unwrapped(net)
    if not isinstance(net, TransformerWrapper):
        raise InputError(f"{what} is a {type(net).__name__}; it must be a TransformerWrapper.")
    if net.num_tokens != vocabulary:
        raise InputError(f"{what} has a vocabulary of {net.num_tokens}, the model one of {vocabulary}.")
    return net


def streamed(
    steps: Callable[[], Iterator[Each]], shown: Callable[[Each], Shown], view: InferenceView
) -> Iterator[Shown]:
    """Yield the results of steps as they come, in the form that a caller may keep and train with.

    Args:
        steps: runs in inference mode.
        shown: what a step yields to what the caller gets.
        view: modules that run, prepared from the first step to the last, or until the caller closes the stream.
    """
    with view:
        remaining = steps()
        while True:
            # inference mode must end before each `yield`, since the caller's code runs there
            with torch.inference_mode():
                each = next(remaining, None)
            if each is None:
                return
            yield shown(each)


def in_shape(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return a function from tensors of inference mode to ordinary ones of a shape."""
    return lambda t: t.clone().reshape(shape)


def with_progress(steps: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """Return the same steps, with a progress bar.

    Raises:
        InputError: if tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise InputError("`progress = True` needs tqdm: `pip install tqdm`, or drop `progress`.") from None
    return iter(tqdm(steps, total=total, unit="token"))
