"""The parts of a generation: prompts, readers of the models, and the rule that chooses tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from x_transformers.decoding.beam import Beams, noisy
from x_transformers.decoding.compiled import CompiledReading
from x_transformers.decoding.loop import Decoding, cut_after_end, make_reader, pair_amateurs, same_vocabulary
from x_transformers.decoding.options import WITHOUT_EXITS, GenerationOptions
from x_transformers.decoding.prompts import Prompts
from x_transformers.decoding.recorded import recorder_for
from x_transformers.decoding.sampling import unchanged
from x_transformers.decoding.speculative import Drafter, Lookup, ModelDrafter, Policy, Speculation
from x_transformers.decoding.step import Sequences
from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.exits import arguments_of_first_blocks
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.notices import warn

PATIENCE = 16
"""Steps between checks whether all rows have ended, where a check waits for a device."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A batch of prompts that is about to be continued.

    Attributes:
        decoding: continues it.
        prompts: what it begins with.
        view: the modules that run.
        options: as the caller gave them.
        pad_value: follows a row's end token.
    """

    decoding: Decoding | Speculation
    prompts: Prompts
    view: InferenceView
    options: GenerationOptions
    pad_value: int

    def steps(self, seq_len: int, every: int = 1) -> Iterator[Tensor]:
        """Return an iterator over at most `seq_len` columns of tokens `(b, 1)`; see `until_ended`."""
        return self.decoding.run(seq_len, self.options.eos_token, self.pad_value, every)

    @property
    def every(self) -> int:
        """Steps between checks whether all rows have ended."""
        # a record must contain no more than what was generated
        return 1 if self.options.return_intermediates else patience(self.prompts.tokens.device)

    def join(self, new: Sequence[Tensor]) -> Tensor:
        """Return the columns of all steps as `(..., m)` tokens, which training may use."""
        tokens = torch.cat([self.prompts.tokens[:, :0], *new], dim=-1)
        if self.every > 1:
            tokens = cut_after_end(tokens, self.options.eos_token)
        return tokens.reshape(*self.prompts.lead, tokens.shape[1])

    @property
    def record(self) -> LayerIntermediates | None:
        """Record of the model's last pass."""
        return self.decoding.expert.record


def begin(
    net: TransformerWrapper,
    prompts: Prompts,
    seq_len: int,
    options: GenerationOptions,
    pad_value: int,
    compiled: CompiledReading | None = None,
) -> Generation:
    """Check the models against the options, and prepare everything that `generate` and `stream` need.

    Args:
        net: the model.
        prompts: what it continues.
        seq_len: number of tokens to generate.
        options: of the generation, with bare models: no wrappers.
        pad_value: follows a row's end token.
        compiled: how the model reads tokens if it is compiled.

    Raises:
        InputError: if models, lengths, cache and options do not fit each other.
    """
    if options.compiles and options.early_exit is not None:
        say_that_all_blocks_run()
    view, vocabulary = InferenceView(net) if compiled is None else compiled.view, net.num_tokens
    given: Sequence[nn.Module] = options.amateur_model or ()  # type: ignore[assignment]
    amateurs = pair_amateurs(given, options.contrastive_decode_kwargs or {}, vocabulary)
    # modules of others may act at each call, and speculation reads several tokens at once
    recorder = None if view.borrows or options.guesses else recorder_for(net, seq_len, options.compile)
    expert = make_reader(view.of(net), prompts, seq_len, options, compiled=compiled, recorder=recorder)
    others = replace(options, cache="dynamic", compile=False, compile_prefill=False, **WITHOUT_EXITS)
    contrasted = [(make_reader(view.of(amateur), prompts, seq_len, others), contrast) for amateur, contrast in amateurs]
    sequences = Sequences(prompts.tokens, prompts.start)
    decoding = Decoding(sequences, expert, options.choose, vocabulary, contrasted)
    if not options.guesses:
        return Generation(decoding, prompts, view, options, pad_value)
    policy = Policy(None if options.greedy else options.adjust)
    drafter: Drafter
    if options.prompt_lookup is not None:
        drafter = Lookup(options.prompt_lookup)
    else:
        draft = options.draft_model
        if options.draft_layers is not None:
            draft = net.shallow(options.draft_layers)
            others = replace(others, arguments=arguments_of_first_blocks(net, draft, options.arguments))
        assert draft is not None
        draft = same_vocabulary(draft, vocabulary, "`draft_model`")
        drafter = ModelDrafter(make_reader(view.of(draft), prompts, seq_len, others), policy, vocabulary)
    readers = [expert, *(reader for reader, _ in contrasted)]
    speculation = Speculation(decoding, readers, drafter, policy, options.guesses)
    return Generation(speculation, prompts, view, options, pad_value)


def search(
    net: TransformerWrapper, prompts: Prompts, seq_len: int, options: GenerationOptions, pad_value: int
) -> tuple[Tensor, Tensor]:
    """Run beam search: tokens `(beams, b, m)` and scores `(beams, b)`, the best first.

    Args:
        net: the model.
        prompts: what it continues.
        seq_len: number of tokens to generate.
        options: of the search.
        pad_value: follows an end token.

    Raises:
        InputError: if the number of beams, lengths, cache and options do not fit each other.
    """
    beams, vocabulary = options.beams, net.num_tokens
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= vocabulary:
        raise InputError(
            f"`beams` is {beams!r}; it must be a whole number, at least 1 and at most the vocabulary's size "
            f"{vocabulary}, since the first beams differ in their first token."
        )
    filtered = options.filter_logits_fn is not unchanged or options.filter_kwargs or options.filter_before_temperature
    if filtered and not options.stochastic:
        raise InputError(
            "`filter_logits_fn`, `filter_kwargs` and `filter_before_temperature` change what stochastic beams are "
            "drawn from; set `stochastic = True`, or drop them."
        )
    view = InferenceView(net)
    reader = make_reader(view.of(net), prompts, seq_len, options)
    select = noisy(options.adjust) if options.stochastic and not options.greedy else unchanged
    sequences = Sequences(prompts.tokens, prompts.start)
    run = Beams(sequences, reader, beams, select, vocabulary, options.eos_token)
    with torch.inference_mode(), view:
        found, scores = run.run(seq_len, pad_value, patience(prompts.tokens.device))
    return found.transpose(0, 1).clone(), scores.T.clone()  # training may use them


@functools.cache
def say_that_all_blocks_run() -> None:
    """Report once that tokens which leave early save nothing in a graph."""
    warn(
        "`exit_confidence` with `compile`: tokens are the same, but a graph runs all blocks for every token, so that "
        "nothing is saved; drop `compile` to run fewer."
    )


def patience(device: torch.device) -> int:
    """Return the steps between checks whether all rows have ended: an accelerator is not waited for at each token."""
    return 1 if device.type == "cpu" else PATIENCE
