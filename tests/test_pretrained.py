"""Folders of pretrained models: what is refused, and that nothing is half loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from x_transformers import TransformerWrapper, load_pretrained
from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError, UnknownKeywordError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "torch_dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (20, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (20, 16),
    f"{LAYER}input_layernorm.weight": (16,),
    f"{LAYER}post_attention_layernorm.weight": (16,),
    **{f"{LAYER}self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
    f"{LAYER}mlp.gate_proj.weight": (24, 16),
    f"{LAYER}mlp.up_proj.weight": (24, 16),
    f"{LAYER}mlp.down_proj.weight": (16, 24),
}
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one layer."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: torch.randn(shape) for name, shape in SHAPES.items()}, tmp_path / FILE)
    return tmp_path


def configure(folder: Path, **entries: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **entries}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


@torch.no_grad()
def test_a_folder_is_a_model(folder: Path) -> None:
    model, ids = load_pretrained(str(folder)), torch.randint(0, 20, (2, 5))
    tensors = load_file(folder / FILE)
    assert not model.training
    assert torch.equal(model.token_emb.emb.weight, tensors["model.embed_tokens.weight"])
    assert not [each for each in (*model.parameters(), *model.buffers()) if each.is_meta]
    again = TransformerWrapper.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids))


def test_weights_train(folder: Path) -> None:
    model = load_pretrained(folder).train()
    model(torch.randint(0, 20, (2, 5))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_file_may_change_after_loading(folder: Path) -> None:
    model, ids = load_pretrained(folder), torch.randint(0, 20, (2, 5))
    wanted = model(ids)
    with (folder / FILE).open("r+b") as file:
        file.write(bytes(1000))
    assert torch.equal(model(ids), wanted)


@torch.no_grad()
def test_overrides(folder: Path) -> None:
    """A window needs no parameters, memory tokens are new ones; a warning says that both change the function."""
    ids, messages = torch.randint(0, 20, (2, 8)), []
    handler = logger.add(lambda message: messages.append(str(message)), level="WARNING", format="{message}")
    try:
        plain, window = load_pretrained(folder), load_pretrained(folder, attn_max_attend_past=2)
        torch.testing.assert_close(plain(ids)[:, :3], window(ids)[:, :3])
        assert not torch.allclose(plain(ids)[:, 3:], window(ids)[:, 3:], atol=1e-3)
        memory = load_pretrained(folder, num_memory_tokens=2, dtype=torch.bfloat16)
    finally:
        logger.remove(handler)
    changes = "changes what the loaded weights compute; train them further."
    assert messages == [
        f"load_pretrained: `attn_max_attend_past` {changes}\n",
        f"load_pretrained: `num_memory_tokens` {changes} New parameters: `memory_tokens`.\n",
    ]
    assert {parameter.dtype for parameter in memory.parameters()} == {torch.bfloat16}
    assert torch.equal(memory.to_logits.weight.float(), plain.to_logits.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"attn_max_atend_past": 2}, UnknownKeywordError, "attn_max_attend_past"),
        ({"ff_glu": False}, StateDictError, r"tensor `model.layers.0.mlp.up_proj.weight`, .* makes \(48, 16\) numbers"),
        ({"tie_embedding": True}, StateDictError, "no place for `to_logits.weight`; drop the keywords"),
        ({"dtype": torch.int32}, InputError, "`dtype` is torch.int32; weights need a floating type"),
    ],
)
def test_overrides_that_do_not_fit(folder: Path, overrides: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        load_pretrained(folder, **overrides)


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({"model_type": "reformer"}, ConfigError, "the type 'reformer', which is not among .* gpt2, .* llama"),
        ({"hidden_act": "xielu"}, ConfigError, "the activation 'xielu', which this version does not know"),
        ({"quantization_config": {"bits": 4}}, ConfigError, "weights of this .* are quantized"),
        ({"rope_scaling": {"rope_type": "new", "factor": 2.0}}, ConfigError, "`rope_type` must be one of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.1}}, ConfigError, "'factor' = 0.1"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, ConfigError, "`rope_parameters` for the kinds full, but"),
        ({"hidden_size": None}, ConfigError, "has no `hidden_size`, which the model needs"),
        ({"hidden_size": "16"}, CheckpointError, "config.json is damaged: TypeError"),
        ({"num_attention_heads": 0}, CheckpointError, "config.json is damaged: ZeroDivisionError"),
        ({"vocab_size": 21}, StateDictError, r"`model.embed_tokens.weight` makes \(20, 16\) numbers"),
        ({"num_hidden_layers": 2}, CheckpointError, "no tensor `model.layers.1.input_layernorm.weight`"),
        ({"attention_bias": True}, CheckpointError, "no tensor `model.layers.0.self_attn.q_proj.bias`"),
    ],
)
def test_configurations_that_are_refused(folder: Path, entries: dict[str, Any], error: type, words: str) -> None:
    configure(folder, **entries)
    with pytest.raises(error, match=words):
        load_pretrained(folder)


def test_old_and_new_names_of_rotary_settings(folder: Path) -> None:
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    configure(folder, rope_theta=500.0, rope_scaling={"type": "llama3", **scaling})
    old = load_pretrained(folder).config
    configure(folder, rope_parameters={"rope_theta": 500.0, "rope_type": "llama3", **scaling})
    assert load_pretrained(folder).config == old
    assert old["options"]["attn_layers"]["options"]["rotary_scaling"] == {"rope_type": "llama3", **scaling}


def _cut(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-1000])


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), CheckpointError, "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[1]"), CheckpointError, "contains list, not an object"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
        (lambda folder: (folder / FILE).unlink(), CheckpointError, "neither model.safetensors nor"),
        (_cut, CheckpointError, "model.safetensors cannot be read as a safetensors file"),
        (lambda folder: (folder / FILE).write_bytes(b"abc"), CheckpointError, "model.safetensors cannot be read"),
        (
            lambda folder: rewrite(folder, lambda tensors: tensors.pop("model.norm.weight")),
            CheckpointError,
            "no tensor `model.norm.weight`",
        ),
        (
            lambda folder: rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1))),
            StateDictError,
            "the files contain `extra`, which models of this family do not have",
        ),
        (
            lambda folder: rewrite(
                folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)})
            ),
            StateDictError,
            r"`model.norm.weight` makes \(16,\) numbers of torch.int32",
        ),
    ],
)
def test_damaged_folders(folder: Path, harm: Callable[[Path], Any], error: type, words: str) -> None:
    harm(folder)
    with pytest.raises(error, match=words):
        load_pretrained(folder)


def test_an_index_that_lies(folder: Path) -> None:
    (folder / FILE).rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "one.safetensors")}))
    load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(SHAPES, "one.safetensors"), "a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"one.safetensors contains no tensor `a`, although"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "two.safetensors")}))
    with pytest.raises(CheckpointError, match=r"two.safetensors cannot be read"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "../one.safetensors")}))
    with pytest.raises(CheckpointError, match="names files outside of its folder"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="`weight_map` does not map tensors to files"):
        load_pretrained(folder)


def test_a_name_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="is no folder on this machine"):
        load_pretrained("meta-llama/Llama-3.2-1B")
