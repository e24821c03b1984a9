"""`TPREncoder` and `DiscoverDecoder`: roles, states by hand, fitting, padding, and decoding."""

from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.discover_wrapper import (
    ROLE_SCHEMES,
    DiscoverDecoder,
    TPREncoder,
    num_roles_for_scheme,
    role_ids_for_tokens,
)
from x_transformers.errors import ConfigError, InputError, TokenRangeError

VOCAB, DIM, FILLERS, BOS, PAD, N = 12, 16, 9, 9, 10, 6


def build(**options: Any) -> DiscoverDecoder:
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, verbose=False)
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=8, attn_layers=layers)
    given = {"num_fillers": FILLERS, "bos_id": BOS, "pad_id": PAD, "max_seq_len": 8, **options}
    return perturb(DiscoverDecoder(decoder=net, **given)).eval()


def padded() -> tuple[Tensor, Tensor]:
    """Tokens and lengths."""
    tokens, lengths = torch.randint(0, FILLERS, (3, N)), torch.tensor([N, 3, 1])
    return tokens.masked_fill(torch.arange(N) >= lengths[:, None], PAD), lengths


def role(scheme: str, row: list[int], i: int) -> int:
    length = len(row)
    if scheme == "left_to_right":
        return i
    if scheme == "right_to_left":
        return length - 1 - i
    if scheme == "bidirectional":
        return (length - 1) * length // 2 + i
    if scheme == "bag_of_words":
        return 0
    before, after = ([FILLERS, *row][i], [*row, FILLERS][i + 1])
    return before * (FILLERS + 1) + after


@pytest.mark.parametrize("scheme", ROLE_SCHEMES)
def test_roles_by_hand(scheme: str) -> None:
    tokens, lengths = padded()
    sizes = {"max_seq_len": N, "num_fillers": FILLERS}
    got = role_ids_for_tokens(tokens, lengths, scheme, **sizes)
    for ids, length, row in zip(tokens.tolist(), lengths.tolist(), got.tolist(), strict=True):
        assert row == [role(scheme, ids[:length], i) if i < length else 0 for i in range(N)]
    assert 0 <= got.min() <= got.max() < num_roles_for_scheme(scheme, **sizes)
    with pytest.raises(ConfigError, match="`scheme` is 'other'"):
        role_ids_for_tokens(tokens, lengths, "other", **sizes)


@pytest.mark.parametrize("mlp_dim", [None, 5])
def test_states_by_hand(mlp_dim: int | None) -> None:
    tpr = perturb(TPREncoder(dim=DIM, num_fillers=FILLERS, num_roles=N, filler_dim=3, role_dim=4, mlp_dim=mlp_dim))
    tokens, lengths = padded()
    roles, mask = torch.randint(0, N, (3, N)), torch.arange(N) < lengths[:, None]
    state = tpr.state(tokens, roles, mask)
    for row in range(3):
        wanted = tpr.bias.clone()
        for i in range(int(lengths[row])):
            f, r = tpr.filler_emb.weight[tokens[row, i]], tpr.role_emb.weight[roles[row, i]]
            wanted = wanted + torch.stack([f @ tpr.binding[o] @ r for o in range(DIM)])
        close(state[row], wanted)
    close(tpr(tokens, roles, mask), tpr.readout(state))
    assert (tpr.mlp is None) is (mlp_dim is None)
    with pytest.raises(TokenRangeError, match="`tokens` must be ids from 0 to 8"):
        tpr.state(tokens, roles)


def test_fitting_explains_encodings() -> None:
    torch.manual_seed(0)
    tokens, lengths = padded()
    mask, roles = (
        tokens != PAD,
        role_ids_for_tokens(tokens, lengths, "left_to_right", max_seq_len=N, num_fillers=FILLERS),
    )
    targets = torch.randn(3, DIM)
    tpr = TPREncoder(dim=DIM, num_fillers=FILLERS, num_roles=N)
    first = tpr.fit(tokens, roles, targets, mask=mask, steps=1, batch_size=8)
    last = tpr.fit(tokens, roles, targets, mask=mask, steps=300, batch_size=8)
    assert 0 < last < first
    assert (tpr(tokens, roles, mask) - targets).square().mean() < 0.01


def test_encodings_and_states_are_graphs() -> None:
    model, (tokens, lengths) = build(), padded()
    tpr = perturb(TPREncoder(dim=DIM, num_fillers=FILLERS, num_roles=8))
    roles = role_ids_for_tokens(tokens, lengths, "left_to_right", max_seq_len=8, num_fillers=FILLERS)
    for each, given in ((model, (tokens,)), (model, (tokens, tokens)), (tpr, (tokens, roles, tokens != PAD))):
        torch.compiler.reset()
        close(torch.compile(each, backend="eager", fullgraph=True)(*given), each(*given))


@torch.no_grad()
def test_padded_rows_are_rows_alone() -> None:
    model, (tokens, lengths) = build(), padded()
    encodings = model(tokens)
    close(encodings, model.encode(tokens, tokens != PAD))
    targets = torch.randint(0, FILLERS, (3, 4))
    logits = model(tokens, targets)
    written = model.decode(encodings, lengths)
    assert (written[tokens == PAD] == PAD).all()
    for row, length in enumerate(lengths.tolist()):
        alone = tokens[row : row + 1, :length]
        close(encodings[row], model.encode(alone)[0])
        close(logits[row], model(alone, targets[row : row + 1])[0])
        close(written[row, :length], model.decode(encodings[row : row + 1], lengths[row : row + 1])[0])


@torch.no_grad()
def test_decoding_takes_the_most_likely_tokens() -> None:
    model, (tokens, _) = build(), padded()
    encodings = model(tokens)
    written = model.decode(encodings, torch.full((3,), 5))
    logits = model.decoder(
        torch.cat((torch.full((3, 1), BOS), written[:, :-1]), dim=1), prepend_embeds=encodings[:, None]
    )
    assert torch.equal(logits[:, 1:].argmax(dim=-1), written)
    # an end token that occurs in every row, also if it is the one that texts begin from
    end = int(written[0, 1])
    ended = model.decode(encodings, eos_id=end)
    assert ended.shape == (3, 8)
    for row in ended.tolist():
        if end in row:
            assert set(row[row.index(end) + 1 :]) <= {PAD}
    assert ended[0, :2].tolist() == written[0, :2].tolist()
    assert torch.equal(model.decode(encodings, eos_id=BOS, max_len=3)[:, 0], written[:, 0])
    # all rows end before the last step, and not at the first one
    row, place = next((r, p) for r in range(3) for p in range(1, 4) if written[r, p] not in written[r, :p])
    alone = model.decode(encodings[row : row + 1], eos_id=int(written[row, place]))[0]
    assert alone.tolist() == [*written[row, : place + 1].tolist(), *[PAD] * (7 - place)]


@torch.no_grad()
def test_surgery_without_an_edit_only_decodes() -> None:
    model, (tokens, lengths) = build(), padded()
    roles = role_ids_for_tokens(tokens, lengths, "left_to_right", max_seq_len=8, num_fillers=FILLERS)
    tpr = perturb(TPREncoder(dim=DIM, num_fillers=FILLERS, num_roles=8))
    assert torch.equal(model.surgery(tokens, tokens, roles, roles, tpr), model.decode(model(tokens), lengths))
    edited = tokens.clone()
    edited[:, 0] = (tokens[:, 0] + 1) % FILLERS
    mask = tokens != PAD
    moved = model(tokens) + tpr(edited, roles, mask) - tpr(tokens, roles, mask)
    assert torch.equal(model.surgery(tokens, edited, roles, roles, tpr), model.decode(moved, lengths))
    with pytest.raises(InputError, match="the padding of `tokens`"):
        model.surgery(tokens, tokens.flip(1), roles, roles, tpr)
    with pytest.raises(TokenRangeError, match="`edited_tokens` must hold fillers"):
        model.surgery(tokens, tokens.masked_fill(mask, BOS), roles, roles, tpr)


def test_refusals() -> None:
    model, (tokens, lengths) = build(), padded()
    with pytest.raises(InputError, match="pass `lengths` or `eos_id`"):
        model.decode(torch.zeros(3, DIM))
    with pytest.raises(InputError, match="9 tokens are asked for"):
        model.decode(torch.zeros(3, DIM), lengths, max_len=9)
    with pytest.raises(InputError, match="it must lie between 0 and 8"):
        model.decode(torch.zeros(3, DIM), lengths + 3)
    with pytest.raises(InputError, match="one is empty"):
        model(torch.full((2, 3), PAD))
    assert build(enc_pos=0).encode(tokens).shape == (3, DIM)
    with pytest.raises(InputError, match="the rows have 6 tokens"):
        build(enc_pos=7)(tokens)
    for options, words in (
        ({"bos_id": VOCAB}, "`bos_id` is 12"),
        ({"enc_pos": "first"}, "'last' or the number"),
        ({"enc_pos": 8}, "positions are 0 to 7"),
        ({"max_seq_len": 9}, "a table of 8 positions"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(**options)
