"""Folders for transformers: what was loaded is written bit for bit, and what was trained here is served there."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_model_files import net
from torch import Tensor

from x_transformers import AutoregressiveWrapper, CrossAttender, Decoder, TransformerWrapper, load_pretrained
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.pretrained.catalog import FAMILIES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
from test_pretrained_families import CASES, TOKENS, near, original  # noqa: E402


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def theirs(folder: Path) -> Any:
    # the eager attention of Falcon adds the bias twice
    attention = "sdpa" if json.loads((folder / "config.json").read_text()).get("alibi") else "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_round_trips(name: str, tmp_path: Path) -> None:
    """The tensors are those of the folder, and a configuration made of our keywords describes the same model."""
    first, second, third = (tmp_path / each for each in "abc")
    model = original(name)
    model.save_pretrained(first)
    ours = load_pretrained(first)
    ours.save_pretrained(second, format="hf")
    wanted, got = tensors(first), tensors(second)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[each], wanted[each]) for each in wanted)
    assert json.loads((second / "config.json").read_text()) == json.loads((first / "config.json").read_text())

    family = model.config.model_type
    if FAMILIES[family].write is None:
        return
    # as if it had been trained here
    ours.pretrained_config = None
    ours.save_pretrained(third, format="hf", family=family, max_shard_size="8KB")
    assert json.loads((third / "config.json").read_text())["model_type"] == family
    got = tensors(third)
    assert all(torch.equal(got[each], wanted[each]) for each in wanted)
    again = theirs(third)
    assert type(again) is type(model)
    ids = torch.randint(3, 60, (2, TOKENS))
    near(again(ids).logits, model(ids).logits)
    assert torch.equal(load_pretrained(third)(ids), ours(ids))


LLAMA: dict[str, Any] = {
    "dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "attn_kv_heads": 2, "use_rmsnorm": True, "norm_eps": 1e-6,
    "norm_add_unit_offset": False, "rotary_pos_emb": True, "rotary_interleaved": False, "rotary_emb_dim": 8,
    "ff_glu": True, "ff_swish": True, "ff_no_bias": True, "ff_glu_no_bias": True, "verbose": False,
}  # fmt: skip


OF_MODEL = {"tie_embedding", "tie_embedding_scale", "emb_scale", "num_memory_tokens"}


def trained(**options: Any) -> TransformerWrapper:
    given: dict[str, Any] = {"tie_embedding": True, "tie_embedding_scale": 1.0, **options}
    model = {each: given.pop(each) for each in OF_MODEL & given.keys()}
    stack = Decoder(**{**LLAMA, **given})
    return TransformerWrapper(num_tokens=60, max_seq_len=64, attn_layers=stack, **model).eval()


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({}, "llama"),
        ({"tie_embedding": False, "tie_embedding_scale": None, "attn_dropout": 0.1, "ff_mult": 8 / 3}, "llama"),
        ({"attn_kv_heads": None, "rotary_scaling": {"rope_type": "linear", "factor": 2.0}}, "llama"),
        ({"attn_max_attend_past": 5}, "mistral"),
        ({"attn_max_attend_past": (5, None)}, "qwen3"),
        ({"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_eps": 1e-6, "attn_qk_rmsnorm_unit_offset": False}, "qwen3"),
        ({"attn_qkv_bias": True}, "qwen2"),
        ({"rotary_layers": (True, False)}, "smollm3"),
        ({"emb_scale": 3.0}, "granite"),
    ],
)
@torch.no_grad()
def test_models_that_were_trained_here(options: dict[str, Any], family: str, tmp_path: Path) -> None:
    model, ids = trained(**options), torch.randint(3, 60, (2, TOKENS))
    model.save_pretrained(tmp_path, format="hf", family=family if "attn_qk_rmsnorm" in options else None)
    written = json.loads((tmp_path / "config.json").read_text())
    if written["model_type"] != family:
        # another family that has these options as well
        assert family in ("qwen3", "qwen2", "llama")
    assert written["architectures"] == [type(theirs(tmp_path)).__name__]
    near(theirs(tmp_path)(ids).logits, model(ids))
    assert torch.equal(load_pretrained(tmp_path)(ids), model(ids))


def test_half_precision_and_origin(tmp_path: Path) -> None:
    """Ids of special tokens stay in the configuration, also on a way through a folder of ours."""
    first, second, third = (tmp_path / each for each in "abc")
    original("llama").save_pretrained(first)
    half = load_pretrained(first, dtype=torch.bfloat16)
    half.save_pretrained(second)
    again = TransformerWrapper.from_pretrained(second)
    again.save_pretrained(third, format="hf")
    written, before = (json.loads((folder / "config.json").read_text()) for folder in (third, first))
    assert (before["dtype"], written["dtype"]) == ("float32", "bfloat16")
    assert {**written, "dtype": "float32"} == before
    assert {each.dtype for each in tensors(third).values()} == {torch.bfloat16}
    # an option that came later
    wide = load_pretrained(first, attn_max_attend_past=7)
    wide.save_pretrained(third, format="hf")
    written = json.loads((third / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", 8)


@pytest.mark.parametrize(
    ("options", "family", "words"),
    [
        (
            {"num_memory_tokens": 2},
            None,
            r"the nearest is `llama`, which differs in `num_memory_tokens` = 2 \(None there",
        ),
        ({"attn_gate_values": True}, None, "differs in `attn_gate_values` = True"),
        ({"attn_gate_values": True}, "gpt2", "models of the family `gpt2` do not have all options of this model; it"),
        ({"norm_add_unit_offset": True}, "llama", r"differs in `norm_add_unit_offset` = True \(False there\)"),
        ({"attn_max_attend_past": 5}, "llama", r"differs in `attn_max_attend_past` = 5 \(None there\)"),
        ({"rotary_interleaved": True}, None, "differs in `rotary_interleaved` = True"),
        (
            {"ff_no_bias": False, "ff_glu_no_bias": False},
            "mistral",
            r"differs in `attn_layers.layers.1.feedforward.up.bias",
        ),
        ({"macaron": True}, None, "differs in `layers` = 'fafaffaf'|differs in `layers`"),
        (
            {"ff_custom_activation": torch.nn.Tanh()},
            None,
            "cannot contain `ff_custom_activation`, an object of your own",
        ),
        ({}, "bloom9", "`family` is 'bloom9'; the families that can be written are .*llama"),
    ],
)
def test_what_no_family_has(options: dict[str, Any], family: str | None, words: str, tmp_path: Path) -> None:
    model = trained(**options)
    with pytest.raises(ConfigError, match=words):
        model.save_pretrained(tmp_path / "new", format="hf", family=family)
    assert not (tmp_path / "new").exists()


def test_models_that_are_no_decoders(tmp_path: Path) -> None:
    stack = CrossAttender(dim=8, depth=1, heads=1, verbose=False)
    crossing = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack)
    for model, words in (
        (
            AutoregressiveWrapper(net()),
            "this is AutoregressiveWrapper; save its `net`",
        ),
        (crossing, "this is one with a stack of the class CrossAttender"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.save_pretrained(tmp_path, format="hf")


def test_gains_of_heads_that_differ(tmp_path: Path) -> None:
    qk = {"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_eps": 1e-6, "attn_qk_rmsnorm_unit_offset": False}
    model = trained(**qk)
    norms = next(iter(model.attn_layers.attentions())).qk_norms["qk_rmsnorm"]
    with torch.no_grad():
        norms.q_norm.gamma[1] += 0.1
    with pytest.raises(StateDictError, match=r"q_norm.gamma` cannot be written .* its heads have gains of their own"):
        model.save_pretrained(tmp_path, format="hf", family="qwen3")


@pytest.mark.parametrize(
    ("table", "kind"), [("encoders", "ForMaskedLM"), ("images", "Model"), ("pairs", "ForConditionalGeneration")]
)
@torch.no_grad()
def test_other_models_that_were_loaded(table: str, kind: str, tmp_path: Path) -> None:
    """Encoders, towers of images and pairs of encoder and decoder are written as they came."""
    module = importlib.import_module(f"test_pretrained_{table}")
    for number, name in enumerate(module.CASES):
        first, second = tmp_path / f"{number}a", tmp_path / f"{number}b"
        module.original(name, kind).save_pretrained(first)
        ours = load_pretrained(first)
        ours.save_pretrained(second, format="hf")
        wanted, got = tensors(first), tensors(second)
        assert got.keys() <= wanted.keys()
        assert all(torch.equal(each, wanted[tensor]) for tensor, each in got.items())
        again = load_pretrained(second)
        assert all(torch.equal(each, again.state_dict()[key]) for key, each in ours.state_dict().items())
