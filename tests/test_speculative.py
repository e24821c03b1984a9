"""Speculative decoding gives what the model alone gives: the same tokens, or the same distribution."""

import copy
from typing import Any

import pytest
import torch
from catalog import BASE, Case, further_ids, name_of, one_of_each, other_inputs, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.cache import KVCache, StaticCache
from x_transformers.decoding.filters import top_k
from x_transformers.decoding.loop import Decoding, cut_after_end
from x_transformers.decoding.options import GenerationOptions
from x_transformers.decoding.sampling import adjuster, unchanged
from x_transformers.decoding.speculative import Draft, Drafter, Lookup, ModelDrafter, Policy, Speculation
from x_transformers.decoding.step import Branching, Sequences
from x_transformers.errors import InputError

PROMPTS, NEW = (7, 4, 2), 14


def noisy(model: TransformerWrapper, noise: float = 0.01) -> TransformerWrapper:
    """A model that guesses right now and then."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn_like(parameter)
    return other


def ragged() -> list[Tensor]:
    return [tokens(1, n)[0] for n in PROMPTS]


def same_as_alone(model: TransformerWrapper, prompts: Any, guess: dict[str, Any], **given: Any) -> None:
    wrapper = AutoregressiveWrapper(model)
    wanted = wrapper.generate(prompts, NEW, temperature=0.0, **given)
    assert torch.equal(wrapper.generate(prompts, NEW, temperature=0.0, **guess, **given), wanted)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="decoding"), ids=name_of)
def test_every_feature_generates_the_same_tokens(stack: str, case: Case) -> None:
    """Also those whose caches hold running states, which go back to what they were."""
    model = case.build(stack)
    prompts = ragged()
    given = other_inputs(model, torch.zeros(len(prompts), 1, dtype=torch.long))
    if "embed_ids" in given:
        given["embed_ids"] = further_ids(model)
    same_as_alone(model, prompts, {"draft_model": noisy(model), "draft_tokens": 3}, **given)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "static": ({"rotary_pos_emb": True}, {"cache": "static"}),
    "no_cache": ({"rotary_pos_emb": True}, {"cache_kv": False}),
    "static_windows": ({"attn_max_attend_past": (2, None)}, {"cache": "static"}),
    "windows": ({"attn_max_attend_past": 2, "num_memory_tokens": 2}, {}),
    "static_states": ({"shift_tokens": 1, "attn_max_attend_past": 2}, {"cache": "static"}),
    "static_suppression": ({"attn_selective": True}, {"cache": "static"}),
    "interspersed": ({"num_memory_tokens": 1, "memory_tokens_interspersed_every": 3}, {}),
    "sliding": ({"max_seq_len": 12, "use_abs_pos_emb": False, "rotary_pos_emb": True}, {}),
    "sliding_anew": ({"max_seq_len": 12}, {"cache_kv": False}),
    "ending": ({}, {"eos_token": 3}),
}
GUESSES: dict[str, dict[str, Any]] = {
    "model": {"draft_tokens": 3},
    "many": {"draft_tokens": 40},
    "one": {"draft_tokens": 1},
    "lookup": {"prompt_lookup": 2},
}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_to_keep_the_past(setting: str, guess: str) -> None:
    options, given = SETTINGS[setting]
    model = BASE.build(**options)
    how = dict(GUESSES[guess])
    if guess != "lookup":
        how["draft_model"] = noisy(model)
    for prompts in (ragged(), tokens(1, 5)):
        same_as_alone(model, prompts, how, **given)


def test_beside_other_arguments() -> None:
    """Amateurs, prepended embeddings, masks, and a cache of what all prompts begin with."""
    model = BASE.build(num_memory_tokens=1)
    ids = tokens(3, 8)
    ids[:, :5] = ids[:1, :5]
    how = {"draft_model": AutoregressiveWrapper(noisy(model)), "draft_tokens": 4}
    same_as_alone(model, ids, how, amateur_model=noisy(model, 0.1))
    same_as_alone(model, ids, how, prepend_embeds=torch.randn(3, 2, 16))
    same_as_alone(model, ids, how, mask=torch.rand(3, 8) > 0.3)
    with torch.no_grad():
        _, record = model(ids[:1, :5], return_intermediates=True)
    same_as_alone(model, ids, how, cache=record)


def test_right_guesses_save_passes() -> None:
    model = BASE.build(rotary_pos_emb=True)
    passes: list[int] = []
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape[1]))
    draft = copy.deepcopy(model)
    draft._forward_hooks.clear()
    prompts = tokens(2, 5)
    got, record = AutoregressiveWrapper(model).generate(
        prompts, 16, temperature=0.0, draft_model=draft, draft_tokens=4, return_intermediates=True
    )
    assert passes == [5, 5, 5, 5], "the prompt, and rounds of one token and four guesses"
    assert record.cache.length == 5 + 16 - 1
    again = AutoregressiveWrapper(model).generate(torch.cat((prompts, got), dim=1), 4, temperature=0.0, cache=record)
    assert torch.equal(again, AutoregressiveWrapper(model).generate(prompts, 20, temperature=0.0)[:, 16:])


def test_a_record_holds_no_guesses_behind_the_end() -> None:
    model = BASE.build()
    wrapper, prompts = AutoregressiveWrapper(model), tokens(1, 5)
    plain = wrapper.generate(prompts, 12, temperature=0.0)
    eos = int(plain[0, 5])
    wanted = wrapper.generate(prompts, 12, eos_token=eos, temperature=0.0)
    for draft in (model, noisy(model)):
        got, record = wrapper.generate(
            prompts, 12, eos_token=eos, temperature=0.0, draft_model=draft, return_intermediates=True
        )
        assert torch.equal(got, wanted)
        assert record.cache.length == 5 + got.shape[1] - 1


def test_streaming() -> None:
    model = BASE.build()
    wrapper, prompts = AutoregressiveWrapper(model), tokens(2, 5)
    streamed = list(wrapper.stream(prompts, 7, temperature=0.0, draft_model=noisy(model)))
    assert torch.equal(torch.stack(streamed, dim=-1), wrapper.generate(prompts, 7, temperature=0.0))


# distributions


class Chain(Branching):
    """A net whose logits depend on the last token alone."""

    window = record = None

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        return self.table[sequences.newest(last)]

    def mark(self, until: int) -> None: ...

    def keep(self, length: int, sequences: Sequences) -> None: ...

    def widen(self, times: int) -> None: ...

    def reorder(self, rows: Tensor) -> None: ...


class Stubborn(Drafter):
    """Guesses what it was told."""

    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft:
        return Draft(torch.tensor([[1, 2, 0]]).expand(len(sequences.tokens()), -1)[:, :count])

    def keep(self, length: int, sequences: Sequences) -> None: ...


VOCABULARY, LENGTH, RUNS = 4, 3, 3000


@pytest.mark.parametrize("kind", ["model", "stubborn"])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_distribution_is_that_of_the_model(kind: str, filtered: bool) -> None:
    """All sequences of three tokens, of two rows that go on together, by a chi-square test."""
    torch.manual_seed(5)
    target, other = torch.randn(2, VOCABULARY, VOCABULARY).unbind(0)
    adjust = adjuster(0.8, top_k if filtered else unchanged, {"k": 3} if filtered else {})
    counts = torch.zeros(2, VOCABULARY**LENGTH)
    powers = VOCABULARY ** torch.arange(LENGTH)
    policy = Policy(adjust)
    for _ in range(RUNS):
        sequences = Sequences(torch.tensor([[0], [2]]))
        expert = Chain(target)
        drafter = ModelDrafter(Chain(other), policy, VOCABULARY) if kind == "model" else Stubborn()
        decoding = Decoding(sequences, expert, GenerationOptions(filter_logits_fn=unchanged).choose, VOCABULARY)
        speculation = Speculation(decoding, [expert], drafter, policy, 2)
        speculation.began = True
        new = torch.cat(list(speculation.run(LENGTH, None, 0)), dim=1)
        counts[torch.arange(2), (new * powers).sum(dim=-1)] += 1

    for row, first in enumerate((0, 2)):
        expected = RUNS * joint(target, adjust, first)
        assert chi_square(counts[row], expected) < 110, "63 degrees of freedom; 110 is beyond one case in 4,000"
        assert chi_square(counts[row], RUNS * joint(other, adjust, first)) > 400, "the test would see other models"


def joint(table: Tensor, adjust: Any, first: int) -> Tensor:
    """The probability of each sequence of tokens behind `first`, the first of them the lowest digit."""
    step = adjust(table).softmax(dim=-1)
    grid = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)
    chance = step[first][grid[:, 0]]
    for at in range(1, LENGTH):
        chance = chance * step[grid[:, at - 1], grid[:, at]]
    out = torch.zeros(VOCABULARY**LENGTH)
    out[(grid * VOCABULARY ** torch.arange(LENGTH)).sum(dim=-1)] = chance
    return out


def chi_square(counts: Tensor, expected: Tensor) -> float:
    impossible = expected == 0
    if counts[impossible].sum() > 0:
        return float("inf")
    return float(((counts - expected).square() / expected)[~impossible].sum())


# guesses


def test_lookup() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 9, 1, 2], [5, 5, 6, 7, 8, 6, 7, 6, 7]])
    draft = Lookup(2).draft(Sequences(ids), 3, None)
    assert draft is not None
    # the latest occurrence of the last two; what follows it is repeated
    assert draft.tokens.tolist() == [[9, 1, 2], [6, 7, 6]]
    assert draft.probs is None
    longer = Lookup(5).draft(Sequences(torch.tensor([[1, 2, 3, 8, 2, 3, 9, 1, 2, 3]])), 2, None)
    assert longer is not None
    assert longer.tokens.tolist() == [[8, 2]], "the longest run of equal tokens counts"


def test_lookup_without_a_guess() -> None:
    ids = torch.tensor([[1, 2, 3, 1], [4, 5, 6, 7]])
    lookup = Lookup(2)
    assert lookup.draft(Sequences(ids), 3, None) is None
    ended = lookup.draft(Sequences(ids), 2, torch.tensor([False, True]))
    assert ended is not None
    assert ended.tokens[0].tolist() == [2, 3]
    assert lookup.draft(Sequences(ids[:1], torch.tensor([1])), 2, None) is None, "padding is no occurrence"


# ends


@pytest.mark.parametrize("every", [2, 5, 100])
def test_looking_for_the_end_now_and_then(every: int) -> None:
    """What is generated behind the end is cut off, so that the output is the same."""
    torch.manual_seed(0)
    table = torch.randn(6, 6)

    def run(every: int) -> Tensor:
        torch.manual_seed(1)
        sequences = Sequences(torch.tensor([[0], [1], [4]]))
        decoding = Decoding(sequences, Chain(table), GenerationOptions(filter_logits_fn=unchanged).choose, 6)
        return torch.cat(list(decoding.run(40, 3, 5, every)), dim=1)

    wanted = run(1)
    assert wanted.shape[1] < 30
    assert torch.equal(cut_after_end(run(every), 3), wanted)
    assert torch.equal(cut_after_end(wanted, None), wanted)


# caches of prompts


def snapshot(cache: KVCache) -> dict[str, Tensor]:
    """Everything in a cache, copied."""
    streams = {
        f"{number}.{name}": stream.clone()
        for number, entry in enumerate(cache.entries)
        for name, stream in (*entry.grown.items(), *entry.states.items())
    }
    scalars = {name: torch.as_tensor(value) for name, value in vars(cache).items() if isinstance(value, (int, Tensor))}
    return {**streams, **{name: value.clone() for name, value in scalars.items()}}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("options", [{}, {"attn_max_attend_past": 3}, {"shift_tokens": 1}, {"attn_selective": True}])
def test_what_prompts_begin_with_is_read_once(static: bool, options: dict[str, Any]) -> None:
    """One row serves many, again and again, and is not changed by it."""
    model = BASE.build(num_memory_tokens=1, **options)
    wrapper = AutoregressiveWrapper(model)
    ids = tokens(4, 12)
    with torch.no_grad():
        _, record = model(
            ids[:1, :9],
            cache=model.static_cache(1, 40) if static else None,
            input_not_include_cache=True,
            return_intermediates=True,
        )
    ids[:, :9] = ids[:1, :9]
    before = snapshot(record.cache)
    for rows in (slice(0, 4), slice(2, 3), slice(1, 4)):
        wanted = wrapper.generate(ids[rows], 8, temperature=0.0)
        got, after = wrapper.generate(ids[rows], 8, temperature=0.0, cache=record, return_intermediates=True)
        assert torch.equal(got, wanted)
        assert isinstance(after.cache, StaticCache) == static
        now = snapshot(record.cache)
        assert now.keys() == before.keys()
        assert all(torch.equal(now[name], t) for name, t in before.items())


# refusals


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"draft_tokens": 3}, "nothing guesses tokens"),
        ({"draft_tokens": 0, "prompt_lookup": 2}, "`draft_tokens` is 0"),
        ({"prompt_lookup": True}, "`prompt_lookup` is True"),
        ({"prompt_lookup": 1, "draft_model": BASE.build()}, "both guess tokens"),
        ({"prompt_lookup": 1, "compile": True}, "`compile` reads one token"),
        ({"draft_model": torch.nn.Linear(2, 2)}, "`draft_model` is a Linear"),
        ({"draft_model": BASE.build(num_tokens=7)}, "`draft_model` has a vocabulary of 7, the model one of 24"),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AutoregressiveWrapper(BASE.build()).generate(tokens(1, 4), 4, **given)


def test_a_draft_of_other_logits() -> None:
    wrapper = AutoregressiveWrapper(BASE.build())
    with pytest.raises(InputError, match="gives logits for 20 tokens"):
        wrapper.generate(tokens(1, 4), 9, draft_model=BASE.build(logits_dim=20))
