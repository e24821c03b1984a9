"""`UniversalPretrainWrapper`: which rows of its buffer are rewritten, by what, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper, random_sequences

VOCAB, N = 12, 8
SIZES: dict[str, Any] = {"batch_size": 2, "buffer_size": 7, "seq_len": N, "seed_length": 2, "num_reset": 2}


def model(max_seq_len: int = N) -> TransformerWrapper:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=max_seq_len, attn_layers=layers)


class Constant(nn.Module):
    """A generator of a token that is no other sequence's."""

    def generate(self, length: int, seed: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert seed.shape == (2, 2)
        assert condition.shape == (2, N)
        return torch.full((2, length), VOCAB - 1)


@pytest.mark.parametrize("on_host", [False, True])
def test_rows_of_the_buffer_are_rewritten(on_host: bool) -> None:
    torch.manual_seed(0)
    wrapper = UniversalPretrainWrapper(model(), Constant(), keep_buffer_on_cpu=on_host, **SIZES)
    wrapper.buffer.clamp_(max=VOCAB - 2)
    for step in range(1, 6):
        before = wrapper.buffer.clone()
        loss = wrapper()
        changed = (wrapper.buffer != before).any(dim=-1)
        generated = (wrapper.buffer == VOCAB - 1).all(dim=-1)
        assert changed.sum() <= 4, "two rows of noise, and two that were generated"
        assert generated.sum() >= 2, "what is generated wins over noise for the same row"
        assert wrapper.step == step
        loss.backward()
    assert ("synth_data_buffer" in wrapper.state_dict()) is not on_host


def test_what_was_generated_wins_over_noise() -> None:
    wrapper = UniversalPretrainWrapper(model(), Constant(), **{**SIZES, "buffer_size": 3, "num_reset": 2})
    for _ in range(10):
        wrapper.buffer.zero_()
        wrapper()
        assert (wrapper.buffer == VOCAB - 1).all(dim=-1).sum() == 2


def test_the_buffer_begins_with_noise_and_constants() -> None:
    wrapper = UniversalPretrainWrapper(model(), **{**SIZES, "buffer_size": 9})
    constant = (wrapper.buffer == wrapper.buffer[:, :1]).all(dim=-1)
    assert constant.sum() == 5
    assert len(wrapper.buffer[constant].unique()) == 1
    rows = random_sequences(VOCAB, N, 3, 2, shuffle=False)
    assert torch.equal(rows[3], rows[4])
    assert len(rows[3].unique()) == 1


def test_the_generator_is_drawn_again() -> None:
    torch.manual_seed(0)
    wrapper = UniversalPretrainWrapper(model(), reset_turing_machine_every=2, **SIZES)
    before = copy.deepcopy(wrapper.data_generator.state_dict())
    wrapper()
    assert all(torch.equal(t, before[name]) for name, t in wrapper.data_generator.state_dict().items())
    wrapper()
    assert not any(torch.equal(t, before[name]) for name, t in wrapper.data_generator.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"use_gru": True}, {"hidden_size": 24}])
def test_generated_tokens_follow_the_logits(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    generator, seed = SyntheticDataGenerator(16, VOCAB, **options), torch.randint(0, VOCAB, (3, 4))
    out = generator.generate(5, seed=seed[:, :1], condition=seed[:, 1:])
    assert torch.equal(out[:, :4], seed)
    logits, _ = generator(out[:, :-1])
    assert torch.equal(logits[:, 3:].argmax(dim=-1), out[:, 4:]), "nearly without temperature, the most likely ones"
    short = SyntheticDataGenerator(16, VOCAB, max_seq_len=3).generate(5, seed=seed)
    assert short.shape == (3, 3)
    with pytest.raises(InputError, match="give `seed` or `condition`"):
        generator.generate(5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_reset": 8}, "at most the size of the buffer, 7"),
        ({"num_reset": 3}, "must be even"),
        ({"buffer_size": 2}, "more than a batch"),
        ({"seq_len": 9}, "a table of 8 positions"),
        ({"seed_length": 9}, "at most the first"),
        ({"data_generator": SyntheticDataGenerator(16, VOCAB, max_seq_len=4)}, "returns at most 4 tokens"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        UniversalPretrainWrapper(model(), **{**SIZES, **options})


def test_copies_have_a_buffer_and_a_generator_of_their_own() -> None:
    torch.manual_seed(0)
    wrapper = UniversalPretrainWrapper(model(), **SIZES)
    before = copy.deepcopy(wrapper.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        copied = copy.deepcopy(wrapper).to(dtype)
        loss = copied()
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in copied.model.parameters())
        assert copied.data_generator.embed.weight.dtype is dtype
        assert copied.synth_data_buffer.dtype is torch.long, "ids are not rounded"
    assert all(torch.equal(t, before[name]) for name, t in wrapper.state_dict().items())


def test_compiled_training_leaves_the_recurrent_network_out_of_graphs() -> None:
    wrapper = UniversalPretrainWrapper(model(), **SIZES)
    copied = copy.deepcopy(wrapper)
    compiled = torch.compile(copied, backend="eager")
    for seed in range(2):
        losses = []
        for each in (wrapper, compiled):
            torch.manual_seed(seed)
            losses.append(each())
        torch.testing.assert_close(*losses)
    assert torch.equal(copied.buffer, wrapper.buffer)


def test_a_run_continues_from_its_state() -> None:
    torch.manual_seed(0)
    wrapper, other = (UniversalPretrainWrapper(model(), **SIZES) for _ in range(2))
    wrapper()
    other.load_state_dict(wrapper.state_dict())
    losses = []
    for each in (wrapper, other):
        torch.manual_seed(1)
        losses.append(each())
    assert torch.equal(*losses)
