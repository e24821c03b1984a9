"""The loop: read, contrast, choose, append; until the length or the end token is reached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from x_transformers.decoding.caches import CacheChoice, first_cache, window_of
from x_transformers.decoding.filters import contrastive_decode_fn
from x_transformers.decoding.generation_inputs import Arguments
from x_transformers.decoding.prompts import Prompts
from x_transformers.decoding.sampling import Choose, check_keywords, check_readable
from x_transformers.decoding.step import Branching, Cached, Prefill, Reader, Rerun, Sequences, Step
from x_transformers.errors import ConfigError, InputError
from x_transformers.models.base import Model
from x_transformers.models.transformer import TransformerWrapper

Given = TypeVar("Given")
Shown = TypeVar("Shown")

Contrast = Callable[[Tensor, Tensor], Tensor]
"""The expert's and an amateur's logits to new ones."""


class Decoding:
    """A batch that is being continued.

    Args:
        sequences: the tokens so far.
        expert: whose expectations count.
        amateurs: whose expectations are contrasted with it, in turn, and how.
        choose: logits `(b, v)` to tokens `(b, 1)`.
        vocabulary: ids that can be read again.
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
        self.choose, self.vocabulary = choose, vocabulary

    def step(self) -> Tensor:
        """Choose and append the next tokens, `(b, 1)`."""
        logits = self.expert.read(self.sequences)[:, -1]
        check_readable(logits, self.vocabulary)
        for amateur, contrast in self.amateurs:
            logits = contrast(logits, amateur.read(self.sequences)[:, -1])
        token = self.choose(logits)
        self.sequences.append(token)
        return token

    def expect(self, readers: Sequence[Branching], last: int) -> Tensor:
        """Logits `(b, last, v)` behind the newest tokens, contrasted, by readers of the expert and the amateurs."""
        logits, *others = [reader.read(self.sequences, last)[:, -last:] for reader in readers]
        check_readable(logits, self.vocabulary)
        for other, (_, contrast) in zip(others, self.amateurs, strict=True):
            logits = contrast(logits, other)
        return logits

    def run(self, seq_len: int, eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
        """At most `seq_len` steps, `(b, 1)` tokens each; see `until_ended`."""
        yield from until_ended((self.step() for _ in range(seq_len)), eos_token, pad_value, every)


def until_ended(steps: Iterator[Tensor], eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
    """Generated tokens `(b, 1)` until every row has ended; behind a row's end token come `pad_value`s.

    Args:
        steps: the tokens.
        eos_token: what ends a row; None for rows that never end.
        pad_value: what follows it.
        every: look whether all rows have ended behind each so many tokens, for which the device must be waited for;
            0 never looks.
    """
    done: Tensor | None = None
    for count, token in enumerate(steps, start=1):
        if eos_token is None:
            yield token
            continue
        ends = token == eos_token
        yield token if done is None else token.masked_fill(done, pad_value)
        done = ends if done is None else done | ends
        if every and count % every == 0 and bool(done.all()):
            return


def cut_behind_end(tokens: Tensor, eos_token: int | None) -> Tensor:
    """`(b, m)` generated tokens up to the column in which the last row ends."""
    if eos_token is None or tokens.shape[1] == 0:
        return tokens
    going = ((tokens == eos_token).cumsum(dim=1) == 0).any(dim=0)
    return tokens[:, : int(going.sum()) + 1]


def make_reader(
    net: Model,
    prompts: Prompts,
    seq_len: int,
    kwargs: Mapping[str, Any],
    *,
    cache: CacheChoice = "dynamic",
    cache_kv: bool = True,
    restrict_to_max_seq_len: bool = True,
    step: Step | None = None,
    prefill: Prefill | None = None,
    at_once: int = 1,
    growing: Callable[[int, int], dict[str, Any]] | None = None,
) -> Branching:
    """A reader of the prompts and of what follows them.

    Args:
        net: the model.
        prompts: what it begins with.
        seq_len: how many tokens follow; the last one is not read.
        kwargs: arguments of its passes.
        cache: "dynamic", "static", or a cache of the prompts' first tokens.
        cache_kv: False reads everything again at each step.
        restrict_to_max_seq_len: the net sees at most its `max_seq_len` tokens.
        step: how a static cache reads one token, if not by an ordinary pass. prefill: how it reads the prompts.
        at_once: tokens of most passes.
        growing: arguments that grow with the sequence; see `Arguments`.

    Raises:
        InputError: if the cache, the length, the arguments, the step and the model do not fit each other.
    """
    total = prompts.tokens.shape[1] + max(seq_len, 1) - 1
    align = None if prompts.lens is None else partial(prompts.align, value=False)
    arguments = Arguments(kwargs, prompts.width, total, align, growing)
    caching = cache_kv and net.can_cache_kv
    if not caching and cache != "dynamic":
        why = "only a causal model can use one" if cache_kv else "`cache_kv = False` switches it off"
        raise InputError(f"a certain cache is asked for (by `cache` or `compile`), but {why}; drop one of them.")
    if step is not None and net.layout.every is not None:
        raise InputError(
            "interspersed memory tokens make steps of different lengths, which cannot be compiled; drop `compile`."
        )
    window = window_of(net, total, caching=caching, restrict=restrict_to_max_seq_len)
    if not caching:
        return Rerun(net, arguments, window)
    embeds = kwargs.get("prepend_embeds")
    prepended = 0 if embeds is None else embeds.shape[1]
    kv, held = first_cache(
        net, prompts.tokens, prompts.start, total, cache=cache, prepended=prepended, window=window, at_once=at_once
    )
    if step is not None and not kv.is_static:
        raise InputError(
            "steps compile over a static cache, and the one given is dynamic; drop `compile`, or give none."
        )
    return Cached(net, arguments, kv, held, window, step, prefill)


def pair_amateurs(
    amateurs: Sequence[nn.Module], kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]], vocabulary: int
) -> list[tuple[TransformerWrapper, Contrast]]:
    """The amateurs, each with its contrast; one set of keywords serves all of them.

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
        pairs.append((net, partial(contrastive_decode_fn, **contrast)))
    return pairs


def check_next_token_net(net: Any) -> None:
    """Raise a `ConfigError` unless the net gives logits for each token, by a single head."""
    if not isinstance(net, TransformerWrapper):
        raise ConfigError(f"`net` is a {type(net).__name__}; it must be a TransformerWrapper around a stack.")
    if net.has_multiple_heads or net.to_logits is None:
        heads = "several heads (`num_output_heads`)" if net.has_multiple_heads else "no head (`return_only_embed`)"
        raise ConfigError(f"`net` has {heads}; predicting the next token needs exactly one.")
    if net.pools or net.returns_pooled:
        raise ConfigError(
            "`net` pools its sequence (class tokens, `average_pool_embed` or `attn_pool`), and so gives no logits for "
            "each token; build it without."
        )


def same_vocabulary(net: nn.Module, vocabulary: int, what: str) -> TransformerWrapper:
    """The model, if it is one of the same vocabulary.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(net, TransformerWrapper):
        raise InputError(f"{what} is a {type(net).__name__}; it must be a TransformerWrapper.")
    if net.num_tokens != vocabulary:
        raise InputError(f"{what} has a vocabulary of {net.num_tokens}, the model one of {vocabulary}.")
    return net


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode; behind it every submodule has the mode it had, whatever happened."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def streamed(
    steps: Callable[[], Iterator[Given]], shown: Callable[[Given], Shown], *modules: nn.Module
) -> Iterator[Shown]:
    """What steps give as it comes, in the form that a caller may keep and train with.

    Args:
        steps: runs in inference mode.
        shown: what each step gives to what the caller gets.
        modules: in evaluation mode until the last step, or until the caller lets the stream go.
    """
    given = torch.inference_mode()(steps)()
    with evaluating(*modules):
        for each in given:
            yield shown(each)


def in_shape(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Tensors of inference mode to ordinary ones of a shape."""
    return lambda t: t.clone().reshape(shape)


Method = TypeVar("Method", bound=Callable[..., Any])


def eval_decorator(fn: Method) -> Method:
    """A method that runs in evaluation mode, and leaves its module's modes as they were."""

    @functools.wraps(fn)
    def inner(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self):
            return fn(self, *args, **kwargs)

    return inner  # type: ignore[return-value]


def with_progress(steps: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """The same, with a bar.

    Raises:
        InputError: if tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise InputError("`progress = True` needs tqdm: `pip install tqdm`, or drop `progress`.") from None
    return iter(tqdm(steps, total=total, unit="token"))
