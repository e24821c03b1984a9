"""Beam search: scores are log-probabilities, beams are what a search by hand finds, whatever is cached."""

import copy
import math

import pytest
import torch
from catalog import perturb
from test_autoregressive import DIM, NETS, SLIDING, VOCAB, build, rows_of, surroundings

from x_transformers import Decoder, TransformerWrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper, top_k
from x_transformers.errors import InputError


@torch.no_grad()
def score(model, prompt, tokens, **kwargs):
    """The sum of the tokens' log-probabilities, from one pass without a cache."""
    extra = kwargs["prepend_embeds"].shape[1] if "prepend_embeds" in kwargs else 0
    logits = model.eval().net(torch.cat((prompt, tokens))[None], **kwargs)[0, extra + len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).sum()


@torch.no_grad()
def by_hand(model, prompt, seq_len, beams, **kwargs):
    """Beam search over lists, one pass for each row and step."""
    rows = [((), 0.0)]
    for _ in range(seq_len):
        found = []
        for tokens, so_far in rows:
            ids = torch.cat((prompt, torch.tensor(tokens, dtype=torch.long)))
            gains = model.eval().net(ids[None], **kwargs)[0, -1].log_softmax(dim=-1)
            for token in gains.topk(beams).indices.tolist():
                found.append(((*tokens, token), so_far + gains[token].item()))
        rows = sorted(found, key=lambda row: -row[1])[:beams]
    return rows


def search(model, prompts, seq_len, **kwargs):
    return model.beam_search(prompts, seq_len, return_beams_and_scores=True, **kwargs)


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_log_probabilities(name, prepended):
    model = build(name)
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (5, 2, 3)]
    kwargs = surroundings(name, 3, prepended)
    tokens, scores = search(model, prompts, 6, beams=3, **kwargs)
    assert tokens.shape == (3, 3, 6)
    assert (scores.diff(dim=0) <= 0).all()
    for row, prompt in enumerate(prompts):
        assert len({tuple(beam.tolist()) for beam in tokens[:, row]}) == 3
        for beam in range(3):
            expected = score(model, prompt, tokens[beam, row], **rows_of(kwargs, row))
            torch.testing.assert_close(scores[beam, row], expected, atol=1e-4, rtol=1e-5)
    for other in ({"cache_kv": False}, {"cache": "static"}):
        again = search(model, prompts, 6, beams=3, **other, **kwargs)
        assert torch.equal(again[0], tokens)
        torch.testing.assert_close(again[1], scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_prefix_that_was_read_stays_as_it_is(static):
    model, x = build("rotary").eval(), torch.randint(0, VOCAB, (2, 6))
    cache = model.net.static_cache(2, 16) if static else None
    given = {"cache": cache, "input_not_include_cache": True, "return_intermediates": True}
    with torch.no_grad():
        _, record = model.net(x[:, :4], **given)
    wanted = search(model, x, 4, beams=3)
    for _ in range(2):
        tokens, scores = search(model, x, 4, beams=3, cache=record)
        assert torch.equal(tokens, wanted[0])
        torch.testing.assert_close(scores, wanted[1], atol=1e-4, rtol=1e-5)


STACKS = {
    "latent": {"attn_use_latent_q": True, "attn_use_latent_kv": True, "attn_dim_latent_q": 8, "attn_dim_latent_kv": 8},
    "streams": {"num_residual_streams": 2},
    "value residual": {"add_value_residual": True},
    "shifted tokens": {"shift_tokens": 1},
    "data dependent alibi": {"attn_data_dependent_alibi": True},
    "selective": {"attn_selective": True},
    "residual attention": {"residual_attn": True},
    "one head": {"attn_one_kv_head": True},
}


@pytest.mark.parametrize("wrapped", [{}, {"mixture_of_softmax": True}], ids=["", "mixture"])
@pytest.mark.parametrize("name", STACKS)
def test_scores_over_what_layers_remember(name, wrapped):
    stack = Decoder(dim=DIM, depth=2, heads=4, attn_dim_head=8, verbose=False, **STACKS[name])
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=stack, **wrapped)
    model, prompts = AutoregressiveWrapper(perturb(net)), [torch.randint(0, VOCAB, (n,)) for n in (4, 2)]
    tokens, scores = search(model, prompts, 5, beams=3)
    for row, prompt in enumerate(prompts):
        for beam in range(3):
            expected = score(model, prompt, tokens[beam, row])
            torch.testing.assert_close(scores[beam, row], expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(search(model, prompts, 5, beams=3, cache_kv=False)[0], tokens)


@pytest.mark.parametrize("name", ["absolute", "cross"])
def test_beams_are_those_of_a_search_by_hand(name):
    model, kwargs = build(name), surroundings(name)
    prompts = torch.randint(0, VOCAB, (2, 4))
    tokens, scores = search(model, prompts, 5, beams=4, **kwargs)
    for row in range(2):
        found = by_hand(model, prompts[row], 5, 4, **rows_of(kwargs, row))
        assert [tuple(beam.tolist()) for beam in tokens[:, row]] == [beam for beam, _ in found]
        torch.testing.assert_close(scores[:, row], torch.tensor([total for _, total in found]), atol=1e-4, rtol=1e-5)
    assert torch.equal(model.beam_search(prompts, 5, **kwargs), tokens[0])


def test_one_beam_is_greedy():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    assert torch.equal(model.beam_search(x, 6, beams=1), model.generate(x, 6, temperature=0.0))


def test_all_continuations_by_as_many_beams():
    model, x = build(), torch.randint(0, VOCAB, (1, 4))
    tokens, scores = search(model, x, 1, beams=VOCAB)
    log_probs = model.net(x)[0, -1].log_softmax(dim=-1)
    assert sorted(tokens.flatten().tolist()) == list(range(VOCAB))
    torch.testing.assert_close(scores.flatten(), log_probs[tokens.flatten()])


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", SLIDING)
def test_the_window_slides(name, prepended):
    model = build(name, max_seq_len=4, depth=1)
    prompts, kwargs = [torch.randint(0, VOCAB, (n,)) for n in (3, 5)], surroundings(name, 2, prepended)
    tokens, _ = search(model, prompts, 6, beams=3, **kwargs)
    alone, _ = search(model, prompts[1], 6, beams=3, **rows_of(kwargs, 1))
    assert torch.equal(tokens[:, 1], alone)


# stochastic beams


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_stochastic_beams(ragged):
    model = build()
    prompts = [torch.randint(0, VOCAB, (n,)) for n in ((4, 2) if ragged else (4, 4))]
    draws = []
    for seed, cache_kv in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        draws.append(search(model, prompts, 5, beams=3, stochastic=True, temperature=1.5, cache_kv=cache_kv))
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
    for tokens, scores in draws:
        for row, prompt in enumerate(prompts):
            for beam in range(3):
                expected = score(model, prompt, tokens[beam, row])
                torch.testing.assert_close(scores[beam, row], expected, atol=1e-4, rtol=1e-5)


def test_one_step_of_stochastic_beams_is_sorted_by_score():
    model, x = build(), torch.randint(0, VOCAB, (3, 4))
    seen = []
    for seed in range(5):
        torch.manual_seed(seed)
        _, scores = search(model, x, 1, beams=5, stochastic=True, temperature=4.0)
        assert (scores.diff(dim=0) <= 0).all()
        seen.append(scores)
    assert not torch.equal(seen[0], seen[1])


def test_removed_tokens_never_displace_others():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    kept = {"filter_logits_fn": top_k, "filter_kwargs": {"k": 2}, "stochastic": True}
    tokens, scores = search(model, x, 3, beams=4, **kept)
    for row in range(2):
        for beam in range(4):
            ids = x[row]
            for token in tokens[beam, row]:  # no beam goes through a removed token
                assert token in model.net(ids[None])[0, -1].topk(2).indices
                ids = torch.cat((ids, token[None]))
    one, fully_masked = search(model, x, 3, beams=3, filter_logits_fn="top_k", filter_kwargs={"k": 1}, stochastic=True)
    assert torch.equal(one[0], model.generate(x, 3, temperature=0.0))
    assert fully_masked[0].isfinite().all()
    assert (fully_masked[1:] == -math.inf).all()
    assert scores.isfinite().all()


def test_temperature_zero_makes_no_noise():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    assert torch.equal(
        search(model, x, 5, stochastic=True, temperature=0.0)[0],
        search(model, x, 5)[0],
    )


# ends


def test_ended_beams_keep_their_score():
    model = build(pad_value=VOCAB - 1)
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (4, 2)]
    plain, _ = search(model, prompts, 6, beams=4)
    end = plain[0, 0, 2].item()  # so that at least one beam ends
    tokens, scores = search(model, prompts, 6, beams=4, eos_token=end)
    ended = 0
    for row, prompt in enumerate(prompts):
        for beam, total in zip(tokens[:, row], scores[:, row], strict=True):
            ids = beam.tolist()
            if end in ids:
                length = ids.index(end) + 1
                assert ids[length:] == [VOCAB - 1] * (len(ids) - length)
                beam, ended = beam[:length], ended + (length < len(ids))
            torch.testing.assert_close(total, score(model, prompt, beam), atol=1e-4, rtol=1e-5)
    assert ended
    assert torch.equal(search(model, prompts, 6, beams=4, eos_token=end, cache_kv=False)[0], tokens)


def test_generation_stops_with_the_last_beam():
    model, x = build(), torch.randint(0, VOCAB, (1, 4))
    with torch.no_grad():
        model.net.to_logits.weight.zero_()
        model.net.to_logits.weight[5] = model.eval().net(x, return_embeddings=True)[0, -1] * 1e3
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    prompt = torch.full((1, 2), 5)  # an end token in the prompt ends nothing
    tokens = model.beam_search(torch.cat((x, prompt), dim=1)[:, :4], 9, beams=1, eos_token=5)
    assert tokens.tolist() == [[5]]
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"stochastic": True, "filter_logits_fn": "top_k", "filter_kwargs": {"k": 2}}])
@pytest.mark.parametrize("ends", [0, 2, 5])
def test_looking_seldom_finds_the_same(ends, options, monkeypatch):
    """Beams that all ended stay as they are, whose scores are equal or -inf too."""
    model = build(pad_value=VOCAB - 1)
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (4, 2)]
    with torch.no_grad():
        model.net.to_logits.weight[ends] = model.net.to_logits.weight[ends + 1] * 1.5  # so that all end soon
    found, passes = [], []
    model.net.register_forward_hook(lambda *_: passes.append(1))
    for every in (1, 3, 16):
        monkeypatch.setattr("x_transformers.decoding.generation.patience", lambda _, every=every: every)
        torch.manual_seed(ends)
        found.append((*search(model, prompts, 20, beams=3, eos_token=ends, **options), len(passes)))
        passes.clear()
    for tokens, scores, _ in found[1:]:
        assert torch.equal(tokens, found[0][0])
        assert torch.equal(scores, found[0][1])
    assert found[0][2] <= found[1][2] <= found[2][2]


def test_looking_seldom_goes_on_behind_the_end(monkeypatch):
    model, x = build(), torch.randint(0, VOCAB, (1, 4))
    with torch.no_grad():
        model.net.to_logits.weight.zero_()  # all tokens are alike
    end = model.beam_search(x, 1, beams=1).item()
    passes = []
    model.net.register_forward_hook(lambda *_: passes.append(1))
    wanted = search(model, x, 9, beams=1, eos_token=end)
    assert (wanted[0].shape[-1], len(passes)) == (1, 1)
    monkeypatch.setattr("x_transformers.decoding.generation.patience", lambda _: 4)
    got = search(model, x, 9, beams=1, eos_token=end)
    assert len(passes) == 1 + 4
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


class Alike(TransformerWrapper):
    """Finds all tokens alike, and behind the first new one only the end."""

    def forward(self, x, **kwargs):
        _, record = super().forward(x, **kwargs)
        out = torch.zeros(len(x), 1, VOCAB)
        if self.ends:
            out[..., 3] = 1e3
        self.ends = True
        return out, record


def test_looking_seldom_keeps_the_order_of_equals(monkeypatch):
    stack = Decoder(dim=DIM, depth=1, heads=1, verbose=False)
    model, x = AutoregressiveWrapper(Alike(num_tokens=VOCAB, max_seq_len=32, attn_layers=stack)), torch.zeros(1, 2)
    found = []
    for every in (1, 9):
        monkeypatch.setattr("x_transformers.decoding.generation.patience", lambda _, every=every: every)
        model.net.ends = False
        found.append(search(model, x.long(), 9, beams=VOCAB, eos_token=3)[0])
    assert len({tuple(beam.tolist()) for beam in found[0][:, 0]}) == VOCAB
    assert torch.equal(*found)


# shapes and refusals


def test_shapes():
    model, x = build(), torch.randint(0, VOCAB, (2, 1, 4))
    tokens, scores = search(model, x, 3, beams=2)
    assert (tokens.shape, scores.shape) == ((2, 2, 1, 3), (2, 2, 1))
    assert not scores.is_inference()
    alone, score_alone = search(model, x[0, 0], 3, beams=2)
    assert (alone.shape, score_alone.shape) == ((2, 3), (2,))
    assert torch.equal(alone, tokens[:, 0, 0])
    assert model.beam_search(x, 3).shape == (2, 1, 3)
    nothing, zero = search(model, x, 0, beams=2)
    assert (nothing.shape, zero.tolist()) == ((2, 2, 1, 0), [[[0.0]] * 2] * 2)
    lens = torch.tensor([3, 4])
    listed = search(model, [x[0, 0, :3], x[1, 0]], 3)
    assert torch.equal(search(model, x[:, 0], 3, prompt_lens=lens)[0], listed[0])


def test_arguments_of_the_prompts():
    model, x = build("absolute"), torch.randint(0, VOCAB, (2, 4))
    mask = torch.tensor([[True, False, True, True], [True] * 4])
    extra, pos = torch.randn(2, 9, DIM), torch.arange(9).flip(0) + torch.tensor([[0], [3]])
    for kwargs in ({"mask": mask}, {"sum_embeds": extra}, {"pos": pos}, {"self_attn_kv_mask": mask}):
        tokens, scores = search(model, x, 5, beams=3, **kwargs)
        for row in range(2):
            alone = search(model, x[row], 5, beams=3, **rows_of(kwargs, row))
            assert torch.equal(tokens[:, row], alone[0])
            torch.testing.assert_close(scores[:, row], alone[1], atol=1e-4, rtol=1e-5)
        uncached = search(model, x, 5, beams=3, cache_kv=False, **copy.copy(kwargs))
        assert torch.equal(uncached[0], tokens)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"beams": 0}, "`beams` is 0; it must be a whole number, at least 1 and at most .* 24"),
        ({"beams": VOCAB + 1}, "`beams` is 25"),
        ({"beams": 2.0}, "`beams` is 2.0"),
        ({"eos_token": VOCAB}, "`eos_token` is 24"),
        ({"temperature": -1.0, "stochastic": True}, "`temperature` is -1.0"),
        ({"filter_logits_fn": "top_k"}, "`stochastic = True`, or drop them"),
        ({"filter_kwargs": {"k": 1}, "stochastic": True}, "`filter_kwargs` do not fit unchanged"),
        ({"seq_start_pos": torch.zeros(2)}, "`seq_start_pos` cannot be given"),
        ({"rotary_pos_emb": (torch.zeros(2, 4, 8), 1.0)}, "`rotary_pos_emb` is a tensor of which it is not known"),
    ],
)
def test_refusals(kwargs, said):
    model = build("absolute").train()
    with pytest.raises(InputError, match=said):
        model.beam_search(torch.ones(2, 4, dtype=torch.long), 4, **kwargs)
    assert model.training
