"""`XTransformer`: a source that a decoder looks at."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from catalog import close, perturb

from x_transformers import XTransformer
from x_transformers.errors import ConfigError, InputError

HALF = {"num_tokens": 24, "max_seq_len": 32, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False}
SRC = torch.randint(0, 24, (3, 7), generator=torch.Generator().manual_seed(1))
TGT = torch.randint(0, 24, (3, 6), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([7, 4, 1])
MASK = torch.arange(7) < LENGTHS[:, None]


def build(**options: Any) -> XTransformer:
    halves = {f"{half}_{name}": value for half in ("enc", "dec") for name, value in HALF.items()}
    return perturb(XTransformer(dim=16, **{**halves, **options})).eval()


def rows(loss_of: Any, count: int = 3) -> torch.Tensor:
    return torch.stack([loss_of(row) for row in range(count)])


@pytest.mark.parametrize(
    "options",
    [{}, {"enc_num_memory_tokens": 2, "dec_num_memory_tokens": 2, "tie_token_emb": True}, {"enc_rotary_pos_emb": True}],
    ids=["plain", "memory", "rotary"],
)
@pytest.mark.parametrize("count", [0, 3])
@torch.no_grad()
def test_padding_of_the_source_is_not_seen(options: dict[str, Any], count: int) -> None:
    model = build(**options)
    embeds = torch.randn(3, count, 16) if count else None
    loss = model(SRC, TGT, mask=MASK, src_prepend_embeds=embeds)

    def alone(row: int) -> torch.Tensor:
        own = None if embeds is None else embeds[row : row + 1]
        return model(SRC[row : row + 1, : LENGTHS[row]], TGT[row : row + 1], src_prepend_embeds=own)

    close(loss, rows(alone).mean())
    if count:
        assert (loss - model(SRC, TGT, mask=MASK)).abs() > 1e-4, "what comes before is visible"


@torch.no_grad()
def test_the_loss_is_that_of_the_decoder() -> None:
    model = build()
    context = model.encoder(SRC, mask=MASK)
    close(model(SRC, TGT, mask=MASK), model.decoder(TGT, context=context, context_mask=MASK))
    loss, (logits, _) = model(SRC, TGT, return_outputs=True)
    assert logits.shape == (3, 5, 24)
    assert loss.ndim == 0
    pairs = torch.eye(7, dtype=torch.bool)
    assert (model(SRC, TGT, attn_mask=pairs) - loss).abs() > 1e-4


@pytest.mark.parametrize("count", [0, 3])
def test_generation_is_greedy_decoding_of_each_row(count: int) -> None:
    """In evaluation mode, whatever mode the model is in, which it has again afterwards."""
    model = build(enc_attn_dropout=0.5, enc_emb_dropout=0.5, dec_ff_dropout=0.5)
    embeds = torch.randn(3, count, 16) if count else None
    wanted = model.generate(SRC, TGT[:, :2], 5, mask=MASK, temperature=0, src_prepend_embeds=embeds)
    model.train()
    torch.nn.Module.eval(model.decoder)
    together = model.generate(SRC, TGT[:, :2], 5, mask=MASK, temperature=0, src_prepend_embeds=embeds)
    assert torch.equal(together, wanted)
    assert model.training
    assert model.encoder.training
    assert not model.decoder.training
    for row in range(3):
        own = None if embeds is None else embeds[row : row + 1]
        alone = model.generate(
            SRC[row : row + 1, : LENGTHS[row]], TGT[row : row + 1, :2], 5, temperature=0, src_prepend_embeds=own
        )
        assert torch.equal(alone, wanted[row : row + 1])
    uncached = model.generate(SRC, TGT[:, :2], 5, mask=MASK, temperature=0, src_prepend_embeds=embeds, cache_kv=False)
    assert torch.equal(uncached, wanted)


@pytest.mark.parametrize("count", [0, 3])
def test_streams(count: int) -> None:
    model = build(enc_attn_dropout=0.5, dec_ff_dropout=0.5).train()
    embeds = torch.randn(3, count, 16) if count else None
    given: dict[str, Any] = {"mask": MASK, "temperature": 0, "src_prepend_embeds": embeds}
    wanted = model.generate(SRC, TGT[:, :2], 5, **given)
    tokens = []
    for token in model.stream(SRC, TGT[:, :2], 5, **given):
        assert all(part.training for part in model.modules())
        assert token.shape == (3,)
        tokens.append(token)
    assert torch.equal(torch.stack(tokens, dim=-1), wanted)
    assert all(part.training for part in model.modules())
    with pytest.raises(InputError, match="`seq_len` is -1"):
        model.stream(SRC, TGT[:, :2], -1)


@torch.no_grad()
def test_starts_of_different_lengths() -> None:
    model = build()
    starts = [TGT[0, :3], TGT[1, :1], TGT[2, :2]]
    together = model.generate(SRC, starts, 4, mask=MASK, temperature=0)
    for row, start in enumerate(starts):
        alone = model.generate(SRC[row : row + 1], start[None], 4, mask=MASK[row : row + 1], temperature=0)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_learns(tied: bool) -> None:
    model = build(tie_token_emb=tied)
    model(SRC, TGT, mask=MASK).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "more", [{}, {"dec_tie_embedding": True}, {"enc_l2norm_embed": True, "dec_l2norm_embed": True}]
)
@torch.no_grad()
def test_a_shared_table_is_one_table(more: dict[str, Any]) -> None:
    model = build(tie_token_emb=True, **more)
    names = [name for name in model.state_dict() if "token_emb" in name]
    assert names == ["encoder.token_emb.emb.weight"]
    net = model.decoder.net
    assert net.token_emb.emb.weight is model.encoder.token_emb.emb.weight
    loss = model(SRC, TGT)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.decoder.net.token_emb.emb.weight is copied.encoder.token_emb.emb.weight
        assert torch.equal(copied(SRC, TGT), loss)
        copied.encoder.token_emb.emb.weight += torch.randn(24, 16)
        assert (copied(SRC, TGT) - loss).abs() > 1e-4
        assert torch.equal(model(SRC, TGT), loss)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_models_are_saved(tied: bool) -> None:
    model = build(tie_token_emb=tied, enc_post_emb_norm=True, dec_ff_glu=True)
    again = XTransformer.from_config(json.loads(json.dumps(model.config))).eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(SRC, TGT), model(SRC, TGT))


@torch.no_grad()
def test_a_file_of_two_tables_does_not_fit_one() -> None:
    apart, tied = build(), build(tie_token_emb=True)
    with pytest.raises((ValueError, RuntimeError), match=r"unexpected: decoder\.net\.token_emb"):
        tied.load_state_dict(apart.state_dict())
    state = {**tied.state_dict(), "decoder.net.token_emb.emb.weight": tied.encoder.token_emb.emb.weight.clone()}
    tied.load_state_dict(state)


def test_context_dropout_is_for_training() -> None:
    model = build(cross_attn_tokens_dropout=0.5)
    seen: list[torch.Size] = []
    model.decoder.net.attn_layers.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["context"].shape), with_kwargs=True
    )
    assert torch.equal(model(SRC, TGT, mask=MASK), model(SRC, TGT, mask=MASK))
    model.train()
    model(SRC, TGT, mask=MASK).backward()
    assert [shape[1] for shape in seen] == [7, 7, 3]


@torch.no_grad()
def test_options_of_a_half_find_their_place() -> None:
    model = build(
        enc_post_emb_norm=True, dec_num_memory_tokens=3, dec_tie_embedding=True, enc_emb_dim=8, dec_attn_qk_norm=True
    )
    assert model.encoder.post_emb_norm is not None
    assert model.decoder.net.num_memory_tokens == 3
    assert model.encoder.emb_dim == 8
    assert model(SRC, TGT).isfinite()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tie_token_embed": True}, "Did you mean `tie_token_emb`"),
        ({"depth": 2}, "unknown keyword `depth`.* begin with `enc_` or `dec_`"),
        ({"enc_dim": 8}, "`enc_dim` cannot be given, since both halves have the width `dim`"),
        ({"dec_cross_attend": False}, "`dec_cross_attend` cannot be given"),
        ({"dec_attn_layers": 3}, "`dec_attn_layers` cannot be given"),
        ({"enc_return_only_embed": False}, "`enc_return_only_embed` cannot be given"),
        ({"tie_token_emb": True, "dec_num_tokens": 25}, "`dec_num_tokens` is 25; untie"),
        ({"tie_token_emb": True, "dec_emb_dim": 8}, "give `emb_dim` and `l2norm_embed` the same"),
        ({"cross_attn_tokens_dropout": 1.0}, "`cross_attn_tokens_dropout` is 1.0"),
        ({"enc_use_cls_token": True}, "every source token"),
        ({"enc_no_such": 1}, "unknown keyword `no_such`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="`enc_max_seq_len` and `dec_num_tokens` must be given"):
        XTransformer(dim=16, enc_num_tokens=3, enc_depth=1, dec_depth=1, dec_max_seq_len=3)


def test_a_smaller_vocabulary_may_share() -> None:
    model = build(tie_token_emb=True, dec_num_tokens=20)
    assert model.generate(SRC, TGT[:, :1].clamp(max=19), 3).max() < 20
    with pytest.raises(InputError, match="`mask` has shape"):
        model(SRC, TGT, mask=MASK[:, 1:])
