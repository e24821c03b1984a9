"""`FreeTransformer` and `BinaryMapper`: losses by hand, padding, conditions, and generation with codes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor

from x_transformers.errors import ConfigError, InputError
from x_transformers.free_transformer import NAT, BinaryMapper, FreeTransformer
from x_transformers.notices import OptionWarning, report_by

VOCAB, N, BITS = 12, 8, 3
SIZES: dict[str, Any] = {
    "num_tokens": VOCAB,
    "dim": 16,
    "dec_head_depth": 1,
    "dec_tail_depth": 2,
    "max_seq_len": 16,
    "latent_bits": BITS,
    "heads": 2,
    "attn_dim_head": 8,
    "verbose": False,
}
CODES = 2**BITS


def build(**options: Any) -> FreeTransformer:
    return perturb(FreeTransformer(**{**SIZES, **options})).eval()


def ids(batch: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


def logits(model: FreeTransformer, x: Tensor, codes: Tensor | None) -> Tensor:
    """Logits after all tokens, conditioned on codes `(b, n or 1, codes)`."""
    embeds = model.token_emb(x)
    embeds = embeds if model.decoder_head is None else model.decoder_head(embeds)
    added = None if codes is None else model.from_latent_to_condition(codes).expand(-1, x.shape[1], -1)
    return model.token_unembed(model.decoder_tail(embeds, self_attn_kv_residuals=added))


def test_codes_are_drawn_bit_by_bit() -> None:
    mapper, given = BinaryMapper(BITS, 0.0).train(), torch.randn(4, 5, BITS, requires_grad=True)
    torch.manual_seed(0)
    bits = torch.rand_like(given) <= (given / 0.7).sigmoid()
    torch.manual_seed(0)
    codes, loss = mapper(given, temperature=0.7)
    index = (bits * torch.tensor([1, 2, 4])).sum(dim=-1)
    assert torch.equal(codes.detach().round(), F.one_hot(index, CODES).float())
    p = given.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(dim=-1)
    close(loss, (BITS * NAT - entropy).relu().mean())
    weights = torch.randn_like(codes)
    (got,) = torch.autograd.grad((codes * weights).sum(), given)
    each = [
        torch.stack([p[..., bit] if code >> bit & 1 else 1 - p[..., bit] for bit in range(BITS)]).prod(dim=0)
        for code in range(CODES)
    ]
    (wanted,) = torch.autograd.grad((torch.stack(each, dim=-1) * weights).sum(), given)
    close(got, wanted)
    hard, nothing = mapper.eval()(given)
    assert not hard.requires_grad
    assert nothing == 0


@pytest.mark.parametrize("options", [{}, {"dec_head_depth": 0}, {"per_token_latents": False}, {"enc_depth": 2}])
def test_the_loss_by_hand(options: dict[str, Any]) -> None:
    model, x = build(kl_loss_threshold=0.0, kl_loss_weight=0.5, **options), ids()
    torch.manual_seed(0)
    total, (loss, information) = model(x, return_all_losses=True)
    embeds, _ = model._read(x[:, :-1])
    torch.manual_seed(0)
    codes = model.encode_to_latents(embeds)
    close(loss, F.cross_entropy(logits(model, x[:, :-1], codes).flatten(0, 1), x[:, 1:].flatten()))
    close(total, loss + 0.5 * information)
    assert information > 0


def test_a_padded_row_is_the_row_alone() -> None:
    for model in (build(pad_id=5), build()):
        x = torch.randint(0, 5, (1, N))
        padded = torch.cat((x[:, :5], torch.full((1, 3), model.pad_id)), dim=1)
        other = torch.cat((x, torch.full((1, 3), model.pad_id)), dim=1)
        losses = []
        for row in (x[:, :5], padded):
            torch.manual_seed(0)
            losses.append(model(row, seq_for_latents=x if row is padded else other))
        close(*losses)


def test_codes_change_the_prediction() -> None:
    model, x = build(), ids()
    codes = F.one_hot(torch.tensor([1, 2, 3]), CODES).float()[:, None]
    assert (logits(model, x, None) - logits(model, x, codes)).abs().max() > 1e-3


@pytest.mark.parametrize("head", [0, 1])
def test_generation_with_codes(head: int) -> None:
    model, x = build(dec_head_depth=head, ff_dropout=0.3).train(), ids(2)[:, :4]
    for codes in (None, 3, [1, 6], F.one_hot(torch.tensor([1, 6]), CODES)):
        out = model.generate(x, 9, codes, temperature=0.0)
        assert out.shape == (2, 9)
        assert torch.equal(out[:, :4], x)
        assert torch.equal(out, model.generate(x, 9, codes, temperature=0.0, use_kv_cache=False))
        ragged = model.generate([x[0], x[1, :2]], 9, codes, temperature=0.0)
        assert torch.equal(ragged[0], out[0])
        own = codes if codes is None or isinstance(codes, int) else codes[1:]
        assert torch.equal(ragged[1, 2:], model.generate(x[1:, :2], 7, own, temperature=0.0)[0])
    assert model.training, "the mode is left as it was"
    given = torch.tensor([1, 6])
    condition = F.one_hot(given, CODES).float()[:, None]
    out = model.generate(x, 6, given, temperature=0.0)
    with torch.no_grad():
        model.eval()
        assert torch.equal(out[:, 4], logits(model, x, condition)[:, -1].argmax(dim=-1))
    ended = model.generate(x, 9, given, temperature=0.0, eos_token=int(out[0, 4]))
    assert torch.equal(ended[0, 5:], torch.zeros(4, dtype=torch.long))


def test_filters_by_name() -> None:
    model, x = build(), ids(2)
    torch.manual_seed(0)
    named = model.generate(x, 12, filter_logits_fn="top_k", logit_filter_kwargs={"k": 1})
    assert torch.equal(named, model.generate(x, 12, temperature=0.0))


def test_refusals() -> None:
    for options, words in (
        ({"dec_tail_depth": 0}, "the codes enter the tail"),
        ({"latent_bits": 0}, "at least 1 and 0"),
        ({"latent_dropout_prob": 1.0}, r"must lie in \[0, 1\)"),
        ({"dec_kwargs": {"depth": 3}}, "`depth` in `dec_kwargs`"),
        ({"rotary_pos_emb": False}, "it is fixed"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(**options)
    model, x = build(), ids(2)
    for latents in (CODES, [0, -1], torch.zeros(3, CODES), [0, 1, 2]):
        with pytest.raises(InputError, match="`latents`"):
            model.generate(x, 12, latents)
    with pytest.raises(InputError, match="the longest prompt has 8 tokens"):
        model.generate(x, 7)
    assert math.isclose(NAT, math.log(2))


def test_a_width_of_latents_is_reported_to_have_no_effect() -> None:
    report_by("warnings")
    try:
        with pytest.warns(OptionWarning, match="`dim_latent` has no effect"):
            build(dim_latent=8)
    finally:
        report_by("loguru")
