"""Preferences: the loss from logits, masks over the tokens that they cover, a reference that stays."""

import copy
import math

import pytest
import torch
from catalog import perturb
from test_autoregressive import build as build_autoregressive

from x_transformers import DPO, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, ShapeError

VOCAB = 24


def model(**options) -> TransformerWrapper:
    stack = Decoder(dim=16, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    return perturb(TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=stack, **options))


def trained(**options) -> DPO:
    """With a policy that has left its reference."""
    dpo = DPO(model(**options.pop("net", {})), **options)
    with torch.no_grad():
        for p in dpo.policy_model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return dpo


@torch.no_grad()
def score(net, ids, tokens) -> float:
    """The mean log-probability of the tokens at the given places."""
    log_probs = net.eval()(ids[None])[0].log_softmax(dim=-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in tokens) / max(len(tokens), 1)


def by_hand(dpo, rows) -> float:
    """`rows` of (preferred, its response's places, unpreferred, its response's places)."""
    losses = []
    for w, at_w, l, at_l in rows:
        policy = score(dpo.policy_model, w, at_w) - score(dpo.policy_model, l, at_l)
        reference = score(dpo.ref_model, w, at_w) - score(dpo.ref_model, l, at_l)
        losses.append(math.log1p(math.exp(-dpo.beta * (policy - reference))))
    return sum(losses) / len(losses)


def data():
    torch.manual_seed(3)
    w, l = torch.randint(0, VOCAB, (2, 9)), torch.randint(0, VOCAB, (2, 9))
    prompt = torch.arange(9) < torch.tensor([[3], [5]])
    return w, l, prompt


def test_loss():
    dpo = trained(beta=0.7)
    w, l, prompt = data()
    rows = [(w[b], range(first, 9), l[b], range(first, 9)) for b, first in enumerate((3, 5))]
    assert abs(dpo(w, l, prompt_mask=prompt).item() - by_hand(dpo, rows)) < 1e-5
    assert abs(dpo(w, l, prompt_mask=prompt[:, 1:]).item() - by_hand(dpo, rows)) < 1e-5
    assert abs(DPO(model())(w, l, prompt_mask=prompt).item() - math.log(2)) < 1e-6  # a policy that is its reference


@pytest.mark.parametrize("pad", [-1, 5, VOCAB], ids=["-1", "an id", "beyond"])
def test_padding_is_not_scored(pad):
    """The first response token counts, the first padding token does not."""
    dpo = trained(pad_id=pad)
    w, l, prompt = data()
    w[w == pad], l[l == pad] = 6, 6
    w[0, 6:], l[1, 7:] = pad, pad
    rows = [(w[0], range(3, 6), l[0], range(3, 9)), (w[1], range(5, 9), l[1], range(5, 7))]
    rows = [(a.clamp(0, VOCAB - 1), b, c.clamp(0, VOCAB - 1), d) for a, b, c, d in rows]
    loss = dpo(w, l, prompt_mask=prompt)
    assert abs(loss.item() - by_hand(dpo, rows)) < 1e-5
    masks = {"preferred_seq_mask": w != pad, "unpreferred_seq_mask": l != pad}
    shown = (w.masked_fill(w == pad, 9), l.masked_fill(l == pad, 11))
    torch.testing.assert_close(dpo(*shown, prompt_mask=prompt, **masks), loss)
    torch.testing.assert_close(dpo(*shown, prompt_mask=prompt, **{k: m[:, 1:] for k, m in masks.items()}), loss)


def test_a_response_without_tokens():
    dpo = trained()
    w, l, prompt = data()
    prompt[0] = True
    loss = dpo(w, l, prompt_mask=prompt)
    rows = [(w[0], [], l[0], []), (w[1], range(5, 9), l[1], range(5, 9))]
    assert abs(loss.item() - by_hand(dpo, rows)) < 1e-5
    loss.backward()
    assert all(p.grad.isfinite().all() for p in dpo.parameters())


def test_only_the_policy_is_trained():
    dpo = trained()
    w, l, prompt = data()
    dpo(w, l, prompt_mask=prompt).backward()
    assert all(p.grad is not None and p.grad.any() for p in dpo.policy_model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in dpo.ref_model.parameters())
    for recurse in (True, False):
        assert list(dpo.parameters(recurse=recurse)) == list(dpo.policy_model.parameters(recurse))
    assert {key.split(".")[0] for key in dpo.state_dict()} == {"policy_model", "ref_model"}


def test_the_reference_of_a_tied_model_stays():
    dpo = DPO(model(tie_embedding=True))
    w, l, prompt = data()
    before = dpo.ref_model.eval()(w)
    with torch.no_grad():
        dpo.policy_model.token_emb.emb.weight.mul_(2)
    assert torch.equal(dpo.ref_model(w), before)
    assert abs(dpo(w, l, prompt_mask=prompt).item() - math.log(2)) > 1e-4


def test_the_reference_has_no_dropout():
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, ff_dropout=0.5)
    dpo = DPO(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=stack, emb_dropout=0.5)).train()
    assert dpo.policy_model.training
    assert not any(part.training for part in dpo.ref_model.modules())
    assert not dpo.eval().policy_model.training


def test_round_trips():
    dpo = trained(beta=0.3, pad_id=2)
    w, l, prompt = data()
    copied = DPO.from_config(dpo.config)
    copied.load_state_dict(dpo.state_dict())
    torch.testing.assert_close(copied(w, l, prompt_mask=prompt), dpo(w, l, prompt_mask=prompt))
    assert copy.deepcopy(dpo).beta == 0.3


def test_low_precision():
    dpo = trained()
    w, l, prompt = data()
    expected = dpo(w, l, prompt_mask=prompt).item()
    loss = dpo.bfloat16()(w, l, prompt_mask=prompt)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - expected) < 0.02


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: DPO(build_autoregressive()), "`model` is a AutoregressiveWrapper; .* pass its `net`"),
        (lambda: DPO(model(), beta=0.0), "`beta` is 0.0"),
        (lambda: DPO(model(return_only_embed=True)), "must predict the next token"),
        (
            lambda: DPO(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Encoder(dim=8, depth=1, heads=1))),
            "a causal stack",
        ),
    ],
)
def test_bad_options(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, l, p: (w[:, :-1], l, p), r"shapes \(2, 8\) and \(2, 9\)"),
        (lambda w, l, p: (w[0], l[0], p[0]), r"shapes \(9,\)"),
        (lambda w, l, p: (w[:, :1], l[:, :1], p[:, :1]), "at least two"),
        (lambda w, l, p: (w, l, p[:, :4]), r"`prompt_mask` has shape \(2, 4\); it must be \(2, 9\)"),
    ],
)
def test_bad_input(change, said):
    w, l, prompt = change(*data())
    with pytest.raises(ShapeError, match=said):
        trained()(w, l, prompt_mask=prompt)
