"""`XMLatentDecoder`: candidates and winners by hand, masks, functions that choose, and generation."""

import math
import random
from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.xm_latent_decoder import XMLatentDecoder

VOCAB, DIM, N, SLOTS, WIDTH, K = 12, 16, 8, 2, 3, 4


def net(**options: Any) -> TransformerWrapper:
    layers = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, verbose=False, **options)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers)


def build(**options: Any) -> XMLatentDecoder:
    given = {"num_latents": SLOTS, "latent_dim": WIDTH, "candidates": K, **options}
    return perturb(XMLatentDecoder(net(), **given)).eval()


def ids(batch: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


def losses(model: XMLatentDecoder, x: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean loss `(b, K)` of each candidate, one pass for each."""
    each = []
    for candidate in latents.unbind(dim=1):
        embeds = model._embedded(candidate)
        seen = None if mask is None else mask[:, :-1]
        shown = x.clamp(min=0)[:, :-1]
        logits = model.net(shown, prepend_embeds=embeds, excise_prepend_embeds=True, mask=seen)
        counts = x[:, 1:] >= 0 if mask is None else (x[:, 1:] >= 0) & mask[:, 1:]
        nll = -logits.log_softmax(dim=-1).gather(-1, x[:, 1:, None].clamp(min=0))[..., 0]
        each.append((nll * counts).sum(dim=-1) / counts.sum(dim=-1))
    return torch.stack(each, dim=1)


@pytest.mark.parametrize("most", [None, 1, 5, 100])
def test_the_best_candidate_of_each_row_learns(most: int | None) -> None:
    model, x, latents = build(), ids(), torch.randn(3, K, SLOTS, WIDTH)
    x[1, 5:], x[2, 2] = -100, -100
    close(model(x, latents=latents, max_batch_size=most), losses(model, x, latents).amin(dim=1).mean())


def test_the_mask_is_that_of_the_input() -> None:
    """Also with padding on the left, and labels in the middle that do not count."""
    model, x, latents = build(), ids(), torch.randn(3, K, SLOTS, WIDTH)
    mask = torch.ones(3, N, dtype=torch.bool)
    mask[0, :3], mask[1, 6:] = False, False
    x[2, 4] = -100
    wanted = losses(model, x, latents, mask)
    close(model(x, latents=latents, mask=mask), wanted.amin(dim=1).mean())
    model.latent_drop_prob = 1.0
    each = model.train()(x, mask=mask)
    counts = mask[:, 1:] & (x[:, 1:] >= 0)
    nll = -model.net(x.clamp(min=0)[:, :-1], mask=mask[:, :-1]).log_softmax(dim=-1)
    close(each, nll.gather(-1, x[:, 1:, None].clamp(min=0))[..., 0][counts].mean())


def test_one_slot_is_drawn_for_each_candidate() -> None:
    model, given = build(), torch.randn(3, SLOTS, WIDTH)
    logits, latents = model(ids(), latents=given, return_loss=False, active_latent_index=1)
    assert logits.shape == (3, K, N, VOCAB)
    assert latents.shape == (3, K, SLOTS, WIDTH)
    close(latents[:, :, 0], given[:, :1].expand(-1, K, -1))
    assert len(latents[:, :, 1].flatten(0, 1).unique(dim=0)) == 3 * K
    _, latents = model(ids(), latents=[given[:, 0], None], return_loss=False, active_latent_index=1)
    close(latents[:, :, 0], given[:, :1].expand(-1, K, -1))


def test_seeds_mean_the_same_with_and_without_a_slot() -> None:
    model, x, found = build(), ids(), []
    for given in (None, 0, 1):
        torch.manual_seed(0)
        random.seed(0)
        loss = model(x, active_latent_index=given)
        found.append((loss, random.random()))
    (loss, number), *others = found
    assert any(torch.equal(loss, other) for other, _ in others)
    assert all(other == number for _, other in others), "a slot is drawn even if one is given"


@pytest.mark.parametrize("most", [None, 2])
def test_functions_that_choose(most: int | None) -> None:
    model, x, latents = build(), ids(), torch.randn(3, K, SLOTS, WIDTH)
    each = losses(model, x, latents)
    worst = each.amax(dim=1).mean()
    close(model(x, latents=latents, winner_fn=lambda t: t.argmax(dim=-1), max_batch_size=most), worst)
    close(model(x, latents=latents, winner_fn=lambda t: t, max_batch_size=most), worst)
    records: list[Any] = []

    def first(t: Tensor, record: Any) -> Tensor:
        records.append(record)
        return torch.zeros(len(t), dtype=torch.long)

    own = model(x, latents=latents, winner_fns=[first, first], active_latent_index=0, max_batch_size=most)
    close(own, each[:, 0].mean())
    assert isinstance(records[0], list) is (most is not None)

    def broken(t: Tensor, record: Any) -> Tensor:
        raise TypeError("an error of the user")

    with pytest.raises(TypeError, match="an error of the user"):
        model(x, latents=latents, winner_fn=broken)
    with pytest.raises(InputError, match=r"it must return \(3,\) indices"):
        model(x, latents=latents, winner_fn=lambda t: t.sum())


def test_repulsion_by_hand() -> None:
    model, x, latents = build(), ids(), torch.randn(3, K, SLOTS, WIDTH)
    plain = model(x, latents=latents)
    logits, _ = model(x[:, :-1], latents=latents, return_loss=False)
    log_p = logits.log_softmax(dim=-1)
    mean = log_p.logsumexp(dim=1, keepdim=True) - math.log(K)
    divergence = (log_p.exp() * (log_p - mean)).sum(dim=-1).mean()
    close(model(x, latents=latents, repulsive_loss_weight=0.5), plain - 0.5 * divergence)


def test_generation_from_latents() -> None:
    model, x, latents = build().train(), ids(2)[:, :4], torch.randn(2, SLOTS, WIDTH)
    out = model.generate(x, 5, latents=latents, temperature=0.0)
    assert torch.equal(out, model.generate(x, 5, latents=latents, temperature=0.0, cache_kv=False))
    ragged = model.generate([x[0], x[1, :2]], 5, latents=latents, temperature=0.0)
    assert torch.equal(ragged[0], out[0])
    assert torch.equal(ragged[1], model.generate(x[1:, :2], 5, latents=latents[1:], temperature=0.0)[0])
    assert model.training
    by_slot = model.generate(x, 5, latents=[latents[:, 0], latents[:, 1]], temperature=0.0)
    assert torch.equal(by_slot, out)


@torch.no_grad()
def test_latents_stay_in_the_window() -> None:
    """Tokens are cut beyond `max_seq_len`, and latent vectors never."""
    model, x, latents = build(), ids(2), torch.randn(2, SLOTS, WIDTH)
    out = model.generate(x, 14, latents=latents, temperature=0.0, cache_kv=False)
    text, given = torch.cat((x, out), dim=1), {"prepend_embeds": model._embedded(latents)}
    for place in range(14):
        seen = text[:, : N + place][:, -16:]
        logits = model.net(seen, excise_prepend_embeds=True, **given)
        assert torch.equal(logits[:, -1].argmax(dim=-1), out[:, place])


def test_candidates_are_chosen_before_generation() -> None:
    model, x = build(), ids(2)[:, :4]

    def surest(logits: Tensor) -> Tensor:
        return logits[:, :, -1].softmax(dim=-1).amax(dim=-1)

    tokens, (tried, winners) = model.generate_with_candidate_latents(
        x, 5, winner_fn=surest, return_best_latents=True, temperature=0.0
    )
    assert len(tried) == len(winners) == 1
    best = tried[0][torch.arange(2), winners[0]]
    assert torch.equal(tokens, model.generate(x, 5, latents=best, temperature=0.0))
    logits, _ = model(x, latents=tried[0], return_loss=False)
    assert torch.equal(winners[0], surest(logits).argmax(dim=-1))
    _, (tried, _) = model.generate_with_candidate_latents(
        x, 2, winner_fns=[surest, surest], candidates=3, return_best_latents=True
    )
    assert [t.shape for t in tried] == [(2, 3, SLOTS, WIDTH)] * SLOTS
    with pytest.raises(InputError, match="pass `winner_fn` or `winner_fns`"):
        model.generate_with_candidate_latents(x, 5)


def test_arguments_of_the_pass_go_with_their_rows() -> None:
    layers = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, verbose=False, cross_attend=True)
    model = perturb(
        XMLatentDecoder(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers), num_latents=SLOTS)
    ).eval()
    x, context, latents = ids(), torch.randn(3, 5, DIM), torch.randn(3, 2, SLOTS, DIM)
    whole = model(x, latents=latents, context=context, max_batch_size=1)
    rows = [model(x[r : r + 1], latents=latents[r : r + 1], context=context[r : r + 1]) for r in range(3)]
    close(whole, torch.stack(rows).mean())


def test_refusals() -> None:
    for options, words in (
        ({"dim": 8}, "embeddings, which have width 16"),
        ({"candidates": 0}, "`candidates` is 0"),
        ({"winner_fns": [len]}, "there are 2 slots"),
        ({"max_batch_size": 0}, "at least 1, or None"),
        ({"latent_drop_prob": 2.0}, r"must lie in \[0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(**options)
    with pytest.raises(InputError, match="where latent vectors go"):
        build()(ids(), prepend_embeds=torch.zeros(3, 1, DIM))
