"""Options on top of loaded weights: each leaves what the model computes as it is, or a warning names it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import BASE, CASES, VOCABULARY, Case, call, name_of, tokens
from loguru import logger
from test_model_files import net

from x_transformers import Decoder, TransformerWrapper, load_pretrained
from x_transformers.errors import CheckpointError, ConfigError, StateDictError
from x_transformers.layers.catalog import KEYWORDS
from x_transformers.models.options.catalog import TRANSFORMER
from x_transformers.pretrained.starts import STARTS

EQUAL = 2e-4
"""A gate that begins at `sigmoid(10)` is not quite open."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield BASE.build(add_value_residual=False, rotary_pos_emb=True, use_abs_pos_emb=False).save_pretrained(path)


def warned(messages: list[str], keyword: str) -> bool:
    return any(f"`{keyword}`" in message for message in messages)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_equal_or_warned(case: Case, folder: Path) -> None:
    messages: list[str] = []
    before, ids = load_pretrained(folder), tokens(2, 12)
    handler = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    try:
        model = load_pretrained(folder, **case.keywords)
    except (ConfigError, StateDictError):
        return  # alternatives of what the weights have, and other shapes, are refused
    finally:
        logger.remove(handler)
    messages = [message for message in messages if message.startswith("load_pretrained: ")]
    assert len(messages) <= 1
    if not messages:
        wanted = before(ids)
        got = call(model, ids)
        assert (got - wanted).abs().max() < EQUAL * wanted.abs().max()


ADDED: tuple[dict[str, Any], ...] = (
    {"add_value_residual": True},
    {"attn_gate_value_heads": True},
    {"attn_head_scale": True, "attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    {"attn_qkv_bias": True, "attn_out_bias": True, "norm_bias": True},
    {"dynamic_pos_bias": True, "dynamic_pos_bias_mlp_depth": 3, "dynamic_pos_bias_norm": True},
    {"rel_pos_bias": True, "reinject_input": True, "learned_reinject_input_gate": True},
    {"attn_use_rel_proj_pos_bias": True, "attn_use_cope": True},
    {"use_layerscale": True},
    {"scale_residual": True, "ff_deep_embed": True},
    {"embed_num_tokens": {"kind": 3}},
)


@pytest.mark.parametrize("added", ADDED, ids=lambda added: next(iter(added)))
def test_what_is_added_begins_without_effect(added: dict[str, Any], folder: Path) -> None:
    """The function is the same, there is no warning, and the new parameters learn."""
    messages: list[str] = []
    ids = tokens(2, 12)
    handler = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    try:
        model = load_pretrained(folder, **added)
    finally:
        logger.remove(handler)
    assert not messages
    wanted = load_pretrained(folder)(ids)
    inputs = {"embed_ids": {"kind": ids % 3}} if "embed_num_tokens" in added else {}
    got = model(ids, **inputs)
    assert (got - wanted).abs().max() < EQUAL * wanted.abs().max()
    known = load_pretrained(folder).state_dict()
    new = [name for name in model.state_dict() if name not in known]
    assert new
    got.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if name in new}
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_what_changes_is_named_once(folder: Path) -> None:
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    try:
        load_pretrained(folder, num_memory_tokens=2, attn_gate_values=True, attn_dropout=0.1, rotary_pos_emb=True)
        load_pretrained(folder, scale_residual=0.5, attn_head_scale=True)
    finally:
        logger.remove(handler)
    assert len(messages) == 2
    assert warned(messages[:1], "num_memory_tokens")
    assert warned(messages[:1], "attn_gate_values")
    assert warned(messages[1:], "scale_residual")
    assert not any(warned(messages, name) for name in ("attn_dropout", "rotary_pos_emb", "attn_head_scale"))


def test_starts_are_of_keywords() -> None:
    stacks = {prefix + name for schema, prefix in KEYWORDS for name in schema.owner}
    assert set(STARTS) <= stacks | TRANSFORMER.owner.keys()


# state dicts of the reference


REFERENCE: dict[str, Any] = {"num_tokens": VOCABULARY, "max_seq_len": 32}
STACK: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "attn_kv_heads": 2, "verbose": False}


@torch.no_grad()
def test_a_state_dict_of_the_reference(tmp_path: Path) -> None:
    model = TransformerWrapper(**REFERENCE, attn_layers=Decoder(**STACK, rotary_pos_emb=True)).eval()
    path, ids = tmp_path / "model.pt", tokens(2, 7)
    torch.save(model.export_reference_state_dict(), path)
    for again in (
        load_pretrained(path, **REFERENCE, **STACK, rotary_pos_emb=True),
        load_pretrained(str(path), **REFERENCE, attn_layers=Decoder(**STACK, rotary_pos_emb=True)),
    ):
        assert torch.equal(again(ids), model(ids))
    half = load_pretrained(path, dtype=torch.bfloat16, **REFERENCE, **STACK, rotary_pos_emb=True)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_files_that_are_no_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save(net().state_dict(), path)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (None, {}, ConfigError, "a file with weights only; .* at least `num_tokens`, `max_seq_len`, `dim`"),
        (None, {**REFERENCE, "attn_layers": Decoder(**STACK), "depth": 2}, ConfigError, "give `depth` to it instead"),
        (None, {**REFERENCE, **STACK}, StateDictError, "the weights in .*model.pt do not fit"),
        (None, {**REFERENCE, **STACK, "heds": 2}, ConfigError, "`heds`"),
        ({"model": net().state_dict()}, {**REFERENCE, **STACK}, StateDictError, "this is a checkpoint"),
        ([1], {**REFERENCE, **STACK}, CheckpointError, "contains a list, not a state dict"),
        (Evil(), {**REFERENCE, **STACK}, CheckpointError, "model.pt cannot be read as a state dict"),
    ]
    for contents, keywords, error, words in cases:
        if contents is not None:
            torch.save(contents, path)
        with pytest.raises(error, match=words):
            load_pretrained(path, **keywords)
    assert "executed" not in capsys.readouterr().out
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a state dict"):
        load_pretrained(path, **REFERENCE, **STACK)
