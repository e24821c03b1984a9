"""Options of generation: documented and checked in one dataclass, which goes from the public methods to the loop."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.decoding.filters import find_filter, top_k
from x_transformers.decoding.sampling import Adjust, Choose, adjuster, draw, is_greedy, most_likely
from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import check_names
from x_transformers.layers.early_exit import EarlyExit
from x_transformers.options.schema import opt
from x_transformers.options.values import accepts, convert, hints_of, misfits, plain

CacheChoice = str | KVCache | LayerIntermediates
"""`"dynamic"`, `"static"`, or what an earlier call returned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationOptions:
    """Everything that may be chosen about a generation except prompts and length.

    Each public method takes some of the fields as parameters, see `takes_options`; the others keep their defaults.

    Attributes:
        arguments: keyword arguments of the model's passes.

    Raises:
        InputError: if a value is out of range, or two options contradict each other.
    """

    eos_token: int | None = opt(
        None, "ends a row; `pad_value`s follow. Generation ends as soon as all rows have ended."
    )
    temperature: float = opt(
        1.0, "0 (or below 1e-6) takes the most likely token; otherwise logits are divided by it before the draw."
    )
    prompt_lens: Tensor | Sequence[int] | None = opt(
        None, "`(...)` number of ids of each row of `prompts`, from the left, that are its prompt."
    )
    filter_logits_fn: str | Callable[..., Tensor] = opt(
        top_k, '"top_p", "top_k", "top_a", "min_p", or a function of logits `(b, v)`.'
    )
    restrict_to_max_seq_len: bool = opt(
        True,
        "the model sees only its last `max_seq_len` tokens. With a cache this is a rolling one, whose keys were "
        "computed with more past than the window holds.",
    )
    amateur_model: nn.Module | Sequence[nn.Module] | None = opt(
        None, "one or more weaker models to contrast with (2210.15097)."
    )
    filter_kwargs: Mapping[str, Any] | None = opt(None, "keywords of the filter.")
    contrastive_decode_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = opt(
        None, "`alpha` and `beta` of `contrastive_decode_fn`, for all amateurs or for each."
    )
    cache_kv: bool = opt(True, "keep keys and values. False runs the whole sequence at each step.")
    return_intermediates: bool = opt(False, "also return the record of the last pass (None without a cache).")
    cache: CacheChoice = opt(
        "dynamic",
        '"dynamic"; "static" (fixed buffers, allocated once); or a cache or record of the prompts\' first tokens, '
        "which are then not read again. The cache given is not changed; one of a single row serves all prompts, which "
        "then begin with the same tokens.",
    )
    compile: bool | Mapping[str, Any] = opt(
        False,
        "compile the step of one token, once for this model, to a full graph over a static cache. May be a dict of "
        "options for `torch.compile`.",
    )
    compile_prefill: bool = opt(
        False, "with `compile`, also compile the reading of prompts, to one graph for all their lengths."
    )
    progress: bool = opt(False, "show a progress bar.")
    filter_before_temperature: bool = opt(
        False, "draw from `softmax(filter(logits) / temperature)`, as the reference library does."
    )
    draft_model: nn.Module | None = opt(
        None,
        "a smaller model, or the wrapper that it was trained in, that guesses tokens, several of which this model "
        "verifies in one pass (2211.17192). Tokens have the same distribution as without it, and at temperature 0 they "
        "are the same. The rows of a batch advance together, by the number of tokens of the row with the fewest right "
        "guesses, so that the gain shrinks with the batch. It gets `kwargs`, too.",
    )
    draft_tokens: int | None = opt(None, "number of guesses in a round; default 4.")
    draft_layers: int | None = opt(
        None,
        "instead of another model, guess by this number of the first blocks: `net.shallow(draft_layers)` (2404.16710).",
    )
    prompt_lookup: int | None = opt(
        None,
        "instead of a model, guess what followed the last tokens, at most this many, where they occurred before "
        "(2304.04487).",
    )
    exit_layer: int | None = opt(
        None, "generate by the first blocks only, up to this one, counted from 1; default all blocks."
    )
    exit_confidence: float | None = opt(
        None,
        "a token leaves the stack after the first of `exit_layers` that is surer of it than this, between 0 and 1, and "
        "later blocks only write its keys and values (2207.07061); at 1 none leaves.",
    )
    exit_measure: str | None = opt(
        None,
        'what is compared with it: "softmax" (the default), "margin" or "similarity"; see `EarlyExit`.',
    )
    exit_layers: Sequence[int] | None = opt(
        None, "blocks after which tokens may leave, counted from 1; default the model's, or all if it has none."
    )
    beams: int = opt(4, "number of continuations of each prompt that are followed.")
    return_beams_and_scores: bool = opt(False, "return all of them, and their scores.")
    stochastic: bool = opt(
        False,
        "propose tokens by `filter(logits / temperature)` with Gumbel noise, which draws without replacement "
        "(1903.06059), instead of the logits. At temperature 0, or below 1e-6, there is no noise.",
    )
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_kinds()
        filter_fn, keywords = find_filter(self.filter_logits_fn), self.filter_kwargs or {}
        # checks all four; not a `functools.cached_property`, which has a lock until Python 3.12: a process that is
        # forked while another thread holds it would wait forever
        self.__dict__["_adjust"] = adjuster(self.temperature, filter_fn, keywords, self.filter_before_temperature)
        for name in ("draft_tokens", "prompt_lookup", "draft_layers", "exit_layer"):
            value, what = getattr(self, name), "blocks" if "layer" in name else "tokens"
            if value is not None and value < 1:
                raise InputError(f"`{name}` is {value!r}; it is a number of {what}, a whole number, at least 1.")
        guessing = [f"`{name}`" for name in DRAFTERS if getattr(self, name) is not None]
        if len(guessing) > 1:
            raise InputError(f"{' and '.join(guessing)} both guess tokens; pass only one of them.")
        if self.draft_tokens is not None and not guessing:
            raise InputError(
                f"`draft_tokens` is {self.draft_tokens}, but nothing guesses tokens; pass `draft_layers`, a "
                "`draft_model` or `prompt_lookup` too."
            )
        if self.compiles and guessing:
            raise InputError(
                "`compile` reads one token at a time, and speculation (`draft_model`, `draft_layers`, `prompt_lookup`) "
                "several; drop one of them."
            )
        self._check_blocks()
        self.__dict__["_early_exit"] = self._read_exits()
        if self.compile_prefill and not self.compiles:
            raise InputError("`compile_prefill` compiles the reading of prompts besides the steps; set `compile` too.")

    def _check_blocks(self) -> None:
        """Raise an `InputError` if a part of the blocks is to run, and something else says which blocks run."""
        given = [name for name in ("exit_layer", "draft_layers") if getattr(self, name) is not None]
        orders = [name for name in ("layers_execute_order", "repeat_blocks") if self.arguments.get(name) is not None]
        if given and orders:
            raise InputError(f"`{given[0]}` counts the blocks as the stack runs them; drop it, or `{orders[0]}`.")
        if self.exit_layer is not None and self.compiles:
            raise InputError(
                "`compile` keeps the graphs of one model, and `exit_layer` makes another one at each call; keep what "
                "`net.shallow(exit_layer)` returns in an `AutoregressiveWrapper`, and compile that."
            )
        if self.draft_layers is not None and self.exit_layer is not None and self.draft_layers >= self.exit_layer:
            raise InputError(
                f"`draft_layers` is {self.draft_layers} and `exit_layer` is {self.exit_layer}; guesses need fewer "
                "blocks than what verifies them."
            )

    def _read_exits(self) -> EarlyExit | None:
        """Return the rule of exits by confidence, or None if there is none."""
        if self.exit_confidence is not None:
            return EarlyExit(self.exit_confidence, self.exit_measure or "softmax", self.exit_layers)
        for name in ("exit_measure", "exit_layers"):
            if getattr(self, name) is not None:
                raise InputError(f"`{name}` says when tokens leave by `exit_confidence`, which is None; pass it too.")
        return None

    def _check_kinds(self) -> None:
        """Raise an `InputError` for a value that does not fit its field; the last token is checked with the model."""
        hints = {name: hint for name, hint in hints_of(GenerationOptions).items() if name not in CHECKED_ELSEWHERE}
        for name in hints:
            value = plain(getattr(self, name))
            object.__setattr__(self, name, convert(hints[name], value) if accepts(hints[name], value) else value)
        for sentence in misfits(hints, vars(self)):
            raise InputError(sentence)
        if isinstance(self.cache, str) and self.cache not in ("dynamic", "static"):
            raise InputError(f'`cache` is {self.cache!r}; it must be "dynamic", "static", or what a call returned.')

    @property
    def adjust(self) -> Adjust:
        """Logits to those that tokens are drawn from."""
        return self.__dict__["_adjust"]

    @property
    def early_exit(self) -> EarlyExit | None:
        """Rule by which tokens leave the stack early, or None."""
        return self.__dict__["_early_exit"]

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn."""
        return is_greedy(self.temperature)

    @property
    def choose(self) -> Choose:
        """Logits `(b, v)` to tokens `(b, 1)`."""
        return most_likely if self.greedy else functools.partial(draw, adjust=self.adjust)

    @property
    def compiles(self) -> bool:
        """True if steps are compiled; an empty dict of options compiles too."""
        return self.compile is not False

    @property
    def guesses(self) -> int:
        """Number of tokens that are guessed in a round; 0 without speculation."""
        if all(getattr(self, name) is None for name in DRAFTERS):
            return 0
        return 4 if self.draft_tokens is None else self.draft_tokens


CHECKED_ELSEWHERE = ("eos_token", "arguments", "amateur_model", "draft_model", "prompt_lens", "beams")
"""Fields that are checked, with words of their own, where they are used."""

WITHOUT_EXITS: Mapping[str, None] = dict.fromkeys(("exit_confidence", "exit_measure", "exit_layers"))
"""Values of options with which no token leaves early."""

DRAFTERS = ("draft_model", "draft_layers", "prompt_lookup")
"""Options that guess tokens, of which at most one is given."""

FIELDS = {entry.name: entry for entry in dataclasses.fields(GenerationOptions)}


def takes_options(
    names: str, *, further: bool = True, **defaults: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a method, whose last parameter is `options: GenerationOptions`, a parameter for each of some options.

    The method's signature and its docstring, where it says `[options]`, then show them.

    Args:
        names: the options, in the order of the signature; after `*` only by keyword. A parameter of the method
            itself may be among them; those that are not come first.
        further: take other keywords too, which become `options.arguments`.
        defaults: where the method's default is another one.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        own = dict(inspect.signature(method).parameters)
        del own["options"]
        parameters = [entry for name, entry in own.items() if name not in names.split()]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name in names.split():
            if name == "*":
                kind = inspect.Parameter.KEYWORD_ONLY
            elif name in own:
                parameters.append(own[name].replace(kind=kind))
            else:
                default = defaults.get(name, FIELDS[name].default)
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=FIELDS[name].type))
        if further:
            parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation="Any"))
        signature = inspect.Signature(parameters, return_annotation=inspect.signature(method).return_annotation)

        @functools.wraps(method)
        def taking(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                check_names(args[0], taking, kwargs)
                raise
            if "kwargs" in bound.arguments:
                check_names(args[0], taking, bound.arguments["kwargs"])
            bound.apply_defaults()
            given = bound.arguments
            options = {name: given.pop(name) for name in list(given) if name in FIELDS and name not in own}
            rest = given.pop("kwargs", {})
            return method(**given, options=GenerationOptions(**options, arguments=rest))

        taking.__signature__ = signature  # type: ignore[attr-defined]
        taking.__doc__ = _documented(method.__doc__ or "", [name for name in names.split() if name in FIELDS])
        return taking

    return decorate


def _documented(doc: str, names: Sequence[str]) -> str:
    """Return a docstring with the lines of options where `[options]` is written."""
    lines = []
    for line in doc.split("\n"):
        if line.strip() != "[options]":
            lines.append(line)
            continue
        indent = line[: line.index("[")]
        for name in names:
            text = f"{name}: {FIELDS[name].metadata['doc']}"
            lines += textwrap.wrap(text, 118, initial_indent=indent, subsequent_indent=f"{indent}    ")
    return "\n".join(lines)
