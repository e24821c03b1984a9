"""Tokens end where the model is surprised, by scripted entropies."""

import math

import pytest
import torch
from torch import nn

from x_transformers import Decoder, EntropyBasedTokenizer, TransformerWrapper
from x_transformers.entropy_based_tokenizer import calc_entropy_from_logits, get_accumulated_threshold_mask
from x_transformers.errors import ConfigError, InputError, ShapeError

SURE, UNSURE = [50.0, 0.0, 0.0, 0.0], [0.0] * 4  # entropies of 0 and ln 4 = 1.386


class Scripted(nn.Module):
    """Model that is uncertain after id 3, half as much after id 2, and certain after others."""

    def forward(self, ids):
        assert (ids >= 0).all()
        table = torch.tensor([SURE, SURE, [0.0, 0.0, -50.0, -50.0], UNSURE])  # 0, 0, ln 2, ln 4
        return table[ids]


def cut(ids, threshold=1.0, lens=None, **options):
    return EntropyBasedTokenizer(Scripted(), threshold, **options)(torch.tensor(ids), lens=lens)


def test_entropy():
    assert calc_entropy_from_logits(torch.zeros(3, 8)).tolist() == pytest.approx([math.log(8)] * 3)
    assert calc_entropy_from_logits(torch.tensor([0.0, -math.inf, 0.0])).item() == pytest.approx(math.log(2))
    assert calc_entropy_from_logits(torch.zeros(8, dtype=torch.bfloat16)).dtype is torch.float32


def test_tokens_end_where_the_entropy_is_high():
    assert cut([[0, 1, 3, 0, 3, 3, 0], [3, 0, 0, 0, 0, 0, 0]]).tolist() == [[3, 2, 1, 1], [1, 6, 0, 0]]
    assert cut([0, 1, 3, 0]).tolist() == [3, 1]
    assert cut([0, 2, 2, 0]).tolist() == [4]
    assert cut([0, 2, 2, 0], threshold=math.log(2) - 1e-4).tolist() == [2, 1, 1]
    assert cut([1]).tolist() == [1]


def test_sums_of_entropies():
    ids = [0, 2, 2, 0, 2, 3, 0, 2, 0]
    assert cut(ids, accumulate_entropy=True).tolist() == [3, 3, 3]
    # below the bound nothing adds up; at the threshold the plain rule is left
    assert cut(ids, accumulate_entropy=True, ignore_entropy_below=0.7).tolist() == [6, 3]
    assert cut(ids, accumulate_entropy=True, ignore_entropy_below=1.0).tolist() == cut(ids).tolist()
    entropies = torch.rand(4, 40)
    for ignore in (0.0, 0.3):
        for row, ends in zip(entropies, get_accumulated_threshold_mask(entropies, 0.9, ignore), strict=True):
            total = 0.0
            for value, end in zip(row.tolist(), ends.tolist(), strict=True):
                total += value if value >= ignore else 0.0
                assert end == (total >= 0.9)
                total = 0.0 if end else total


def test_no_token_is_longer_than_allowed():
    assert cut([0, 0, 0, 0, 3, 0, 0, 0], max_token_size=2).tolist() == [2, 2, 1, 2, 1]
    assert cut([[0, 3, 0, 0, 0], [0, 0, 0, 0, 0]], max_token_size=3).tolist() == [[2, 3], [3, 2]]
    assert cut([0, 3, 0], max_token_size=1).tolist() == [1, 1, 1]


def test_lengths():
    ids = [[0, 3, 0, 3, -1, -1], [0, 0, 0, 0, 0, 3], [-1] * 6]
    lens = torch.tensor([4, 2, 0])
    assert cut(ids, lens=lens).tolist() == [[2, 2], [2, 0], [0, 0]]
    assert cut(ids, lens=lens, max_token_size=1).tolist() == [[1] * 4, [1, 1, 0, 0], [0] * 4]
    assert cut(ids[0], lens=torch.tensor(3)).tolist() == [2, 1]
    assert cut(ids[:1], lens=torch.tensor([0])).shape == (1, 0)


def test_segments():
    tokenizer = EntropyBasedTokenizer(Scripted(), 1.0)
    ids = torch.tensor([[0, 3, 1, 2, 9, 9], [9] * 6, [1, 1, 3, 3, 0, 0]])
    parts = tokenizer(ids, lens=torch.tensor([4, 0, 6]), return_segmented_seq=True)
    assert [[t.tolist() for t in row] for row in parts] == [[[0, 3], [1, 2]], [], [[1, 1, 3], [3], [0, 0]]]
    assert all(isinstance(row, tuple) for row in parts)
    alone = tokenizer(ids[2], return_segmented_seq=True)
    assert [t.tolist() for t in alone] == [[1, 1, 3], [3], [0, 0]]


def test_a_real_decoder_in_its_mode():
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, ff_dropout=0.5, cross_attend=True)
    net = TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=stack).train()
    tokenizer = EntropyBasedTokenizer(net, 2.9)
    ids, context = torch.randint(0, 20, (3, 12)), torch.randn(3, 4, 16)
    one, other = (tokenizer(ids, decoder_forward_kwargs={"context": context}) for _ in range(2))
    assert net.training
    assert torch.equal(one, other)
    assert one.sum(dim=-1).tolist() == [12] * 3
    lens = torch.tensor([12, 5, 8])
    padded = ids.masked_fill(torch.arange(12) >= lens[:, None], -1)
    together = tokenizer(padded, lens=lens, decoder_forward_kwargs={"context": context})
    for row, length in enumerate(lens.tolist()):
        alone = tokenizer(ids[row, :length], decoder_forward_kwargs={"context": context[row : row + 1]})
        assert together[row][: len(alone)].tolist() == alone.tolist()
        assert not together[row][len(alone) :].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate_entropy": True, "ignore_entropy_below": 2.0}, "`ignore_entropy_below` is 2.0; .* 1.0"),
        ({"ignore_entropy_below": 0.5}, "set `accumulate_entropy = True`"),
        ({"max_token_size": 0}, "`max_token_size` is 0"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        EntropyBasedTokenizer(Scripted(), 1.0, **options)


@pytest.mark.parametrize(
    ("ids", "lens", "error", "said"),
    [
        (torch.zeros(2, 0, dtype=torch.long), None, ShapeError, "nothing to cut"),
        (torch.full((2, 3), 0.5), None, InputError, "integer type"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([1]), ShapeError, "2 whole numbers"),
        (torch.zeros(1, 3, dtype=torch.long), torch.tensor([4]), InputError, r"`lens` holds \[4\]; the rows have 3"),
    ],
)
def test_bad_input(ids, lens, error, said):
    with pytest.raises(error, match=said):
        EntropyBasedTokenizer(Scripted(), 1.0)(ids, lens)
