"""The command `generate`: text that a trained model writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.errors import InputError
from x_transformers.training.command_line import Parser, add_flags, default_device, device, flag, number, read_options
from x_transformers.training.refusals import one_sentence
from x_transformers.training.tokenizer import Tokenizer, tokenizer_at
from x_transformers.training.trained import PLACES, language_model, local_place, tokenizer_of


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Flags of the command."""

    prompt: str = flag("The ", "text to continue")
    length: int = flag(200, "number of tokens at most", number(int, 1), metavar="N")
    samples: int = flag(1, "number of texts", number(int, 1), metavar="N")
    temperature: float = flag(0.8, "0 takes the most likely token", number(float, 0))
    top_k: int | None = flag(None, "keep the k most likely tokens", number(int, 1), metavar="K")
    top_p: float | None = flag(None, "keep the likeliest tokens of this probability together", number(float, 0, 1))
    min_p: float | None = flag(
        None, "keep tokens of at least this fraction of the highest probability; default 0.1", number(float, 0, 1)
    )
    seed: int | None = flag(None, "of the random draws", number(int, 0, 2**32 - 1))
    stream: bool = flag(False, "print the text while it is written")
    tokenizer: Path | None = flag(None, "tokenizer.json; default that of the model", Path)
    device: str = flag(default_device(), "cpu, cuda, ...", device)

    def filters(self) -> dict[str, Any]:
        """Return the options of generation that filter logits.

        Raises:
            InputError: if there are several.
        """
        given = {name: value for name in ("top_k", "top_p", "min_p") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            words = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{words} are given together; pass one of them.")
        name, value = next(iter(given.items()), ("min_p", 0.1))
        keyword = {"top_k": "k", "top_p": "thres", "min_p": "min_p"}[name]
        return {"filter_logits_fn": name, "filter_kwargs": {keyword: value}}


def generate(arguments: Sequence[str] | None = None) -> None:
    """Continue a prompt with a trained model.

    Args:
        arguments: of the command line; default those of this process.
    """
    parser = Parser(prog="x-transformers generate", description=__doc__)
    parser.add_argument("model", help=PLACES)
    add_flags(parser, Generation)
    given = parser.parse_args(arguments)
    options = read_options(Generation, given)
    with one_sentence():
        place = local_place(given.model)
        model = language_model(place, options.device)
        vocabulary = model.net.num_tokens
        tokenizer = (
            tokenizer_at(options.tokenizer, vocabulary) if options.tokenizer else tokenizer_of(place, vocabulary)
        )
        if options.seed is not None:
            torch.manual_seed(options.seed)
        for number_of in range(options.samples):
            if number_of:
                print("\n" + "-" * 40)
            for piece in _pieces(model, tokenizer, options):
                print(piece, end="", flush=True)
            print()


def _pieces(model: AutoregressiveWrapper, tokenizer: Tokenizer, options: Generation) -> Iterator[str]:
    """Yield the prompt and its continuation, in pieces if they are streamed."""
    ids = tokenizer.prompt(options.prompt.encode("utf-8", "surrogateescape"))
    if not ids:
        if tokenizer.end is None:
            raise InputError(
                "--prompt is empty, and the tokenizer has no token that begins a document; pass some text."
            )
        ids = [tokenizer.end]
    prompt = torch.tensor([ids], device=options.device)
    given: dict[str, Any] = {"temperature": options.temperature, "eos_token": tokenizer.end, **options.filters()}
    if not options.stream:
        found: Tensor = model.generate(prompt, options.length, **given)
        yield tokenizer.decode(_up_to(tokenizer.end, [*ids, *found[0].tolist()], len(ids)))
        return
    new = (int(token) for token in model.stream(prompt, options.length, **given))
    yield from decoded(tokenizer, ids, new)


def _up_to(end: int | None, ids: list[int], start: int) -> list[int]:
    """Return ids up to the first end after a start."""
    return ids[: ids.index(end, start)] if end is not None and end in ids[start:] else ids


def decoded(tokenizer: Tokenizer, ids: list[int], new: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids, and of new ones as they come; characters are shown when all of their bytes are there.

    Args:
        tokenizer: of the ids.
        ids: that are there.
        new: that follow.
    """
    ids, shown = list(ids), ""
    text = tokenizer.decode(ids)
    yield text
    shown = text
    for each in new:
        if each == tokenizer.end:
            break
        ids.append(each)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]
