"""Ids of every integer type are the same ids: in each pass, loss and way to generate, and as labels and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import VOCABULARY, Case, cases, name_of, one_of_each, other_inputs, perturb, tokens
from torch import Tensor, nn

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.entropy_based_tokenizer import EntropyBasedTokenizer
from x_transformers.ops import flipped

TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_passes(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, 8)
    given = other_inputs(model, ids)
    wanted = model(ids, **given)
    for dtype in (torch.uint8, torch.int32, torch.uint16):
        if "embed_ids" in given:
            given["embed_ids"] = {name: t.to(dtype) for name, t in given["embed_ids"].items()}
        assert torch.equal(model(ids.to(dtype), **given), wanted)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="generation"), ids=name_of)
def test_arguments_that_count(stack: str, case: Case) -> None:
    """Positions and starts of rows are integers too."""
    model, ids = case.build(stack), tokens(2, 8)
    given = other_inputs(model, ids)
    start, pos = torch.tensor([0, 3]), torch.arange(8)
    padded, placed = model(ids, seq_start_pos=start, **given), model(ids, pos=pos, **given)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(ids, seq_start_pos=start.to(dtype), **given), padded)
        assert torch.equal(model(ids, pos=pos.to(dtype), **given), placed)


def net(stack: type = Decoder, **more: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = stack(dim=16, depth=1, heads=2, verbose=False)
    return perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=8, attn_layers=layers, **more)).eval()


def numbers() -> XValAutoregressiveWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    model = XValTransformerWrapper(num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=8, attn_layers=layers)
    return XValAutoregressiveWrapper(perturb(model)).eval()


def translation() -> XTransformer:
    torch.manual_seed(0)
    half = {"num_tokens": VOCABULARY, "max_seq_len": 8, "depth": 1, "heads": 2, "verbose": False}
    both = {f"{name}_{key}": value for name in ("enc", "dec") for key, value in half.items()}
    return XTransformer(dim=16, **both).eval()


def several() -> MultiInputTransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    return MultiInputTransformerWrapper(num_tokens={"a": VOCABULARY, "b": 9}, max_seq_len=8, attn_layers=layers).eval()


LENS = torch.tensor([8, 5])
OF_PROMPTS = torch.tensor([3, 1])
PROMPT_MASK = torch.arange(8).expand(2, -1) < 2

Use = Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Any]
"""What is done with a model and ids; the third argument casts other integers."""

USES: dict[str, tuple[Callable[[], nn.Module], Use]] = {
    "next token": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m(x, lens=to(LENS))),
    "in chunks": (lambda: AutoregressiveWrapper(net(), loss_chunk_size=3, mask_prob=0.2), lambda m, x, to: m(x)),
    "next embedding": (lambda: AutoregressiveWrapper(net(add_continuous_pred_head=True)), lambda m, x, to: m(x)),
    "deep embedding": (lambda: AutoregressiveWrapper(net(ff_deep_embed=True)), lambda m, x, to: m(x)),
    "generate": (
        lambda: AutoregressiveWrapper(net()),
        lambda m, x, to: m.generate(x[:, :3], 4, prompt_lens=to(OF_PROMPTS), eos_token=3),
    ),
    "list of prompts": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.generate([x[0, :3], x[1, :2]], 4)),
    "without a cache": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.generate(x[:, :3], 4, cache_kv=False)),
    "static": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.generate(x[:, :3], 4, cache="static")),
    "amateur": (
        lambda: AutoregressiveWrapper(net()),
        lambda m, x, to: m.generate(x[:, :3], 4, amateur_model=net(), return_intermediates=True)[0],
    ),
    "draft": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.generate(x[:, :3], 4, draft_model=net())),
    "lookup": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.generate(x[:, :3], 4, prompt_lookup=2)),
    "beams": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: m.beam_search(x[:, :3], 4, eos_token=3)),
    "stream": (lambda: AutoregressiveWrapper(net()), lambda m, x, to: torch.stack([*m.stream(x[:, :3], 4)])),
    "further ids": (
        lambda: AutoregressiveWrapper(net(embed_num_tokens={"kind": VOCABULARY})),
        lambda m, x, to: m.generate(x[:, :3], 4, embed_ids={"kind": x}),
    ),
    "segments": (lambda: XLAutoregressiveWrapper(net(max_mem_len=4)), lambda m, x, to: m(x.repeat(1, 2))),
    "generated segments": (
        lambda: XLAutoregressiveWrapper(net(max_mem_len=4)),
        lambda m, x, to: m.generate(x.repeat(1, 2), 4),
    ),
    "preferences": (
        lambda: DPO(net(), pad_id=5),
        lambda m, x, to: m(x, flipped(x), prompt_mask=PROMPT_MASK),
    ),
    "preferences, padding outside": (
        lambda: DPO(net(), pad_id=100),
        lambda m, x, to: m(x, flipped(x), prompt_mask=PROMPT_MASK),
    ),
    "belief states": (lambda: BeliefStateWrapper(net()), lambda m, x, to: m(x, lens=to(LENS))),
    "belief states, generated": (
        lambda: BeliefStateWrapper(net()),
        lambda m, x, to: m.generate_with_suffix_cond(x[:, :3], 4, suffix=x[0, :2]),
    ),
    "belief states, backwards": (
        lambda: BeliefStateWrapper(net()),
        lambda m, x, to: m.generate_with_suffix_cond(x[:, :3], 4, decode_backwards=True),
    ),
    "masked tokens": (lambda: NonAutoregressiveWrapper(net(Encoder), mask_id=0), lambda m, x, to: m(x).loss),
    "a critic": (
        lambda: NonAutoregressiveWrapper(net(Encoder), mask_id=0, self_token_critic=True),
        lambda m, x, to: m(x).loss,
    ),
    "numbers": (numbers, lambda m, x, to: m(x, x.float())),
    "generated numbers": (
        numbers,
        lambda m, x, to: m.generate(x[:, :3], x[:, :3].float(), 4, prompt_lens=to(OF_PROMPTS)).sampled_token_ids,
    ),
    "translation": (translation, lambda m, x, to: m(x, flipped(x))),
    "generated translation": (translation, lambda m, x, to: m.generate(x, x[:, :2], 3)),
    "several inputs": (several, lambda m, x, to: tuple(m({"a": x, "b": to(x.long() % 9)}).values())),
    "tokenizer": (
        lambda: EntropyBasedTokenizer(net(), entropy_threshold=3.1),
        lambda m, x, to: m(x, lens=to(LENS)),
    ),
}


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [each for part in value for each in results(part)]


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_objectives_and_generation(name: str, dtype: torch.dtype) -> None:
    build, use = USES[name]
    model, ids = build(), (torch.arange(16).reshape(2, 8) * 5) % VOCABULARY
    torch.manual_seed(1)
    wanted = results(use(model, ids, lambda t: t))
    torch.manual_seed(1)
    got = results(use(model, ids.to(dtype), lambda t: t.to(dtype)))
    assert len(got) == len(wanted)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(mine.long() if not mine.is_floating_point() else mine, other)
