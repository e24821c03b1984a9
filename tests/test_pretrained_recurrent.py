"""Families with recurrent layers; `test_pretrained_families.py` and `test_pretrained_writing.py` run their cases."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HYBRID: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 1,
}
GRIFFIN: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
QWEN: dict[str, Any] = {
    **{name: value for name, value in HYBRID.items() if name != "num_experts"},
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}

UNPADDED = {"recurrent_gemma", "rwkv", "xlstm"}
"""Families whose models read padding as tokens in transformers, so that only rows without padding are compared."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", SIZES),
    "mamba, other sizes": (
        "Mamba",
        {**SIZES, "state_size": 5, "expand": 3, "conv_kernel": 3, "time_step_rank": 4, "tie_word_embeddings": False},
    ),
    "mamba2": ("Mamba2", {**SIZES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 4}),
    "mamba2, tied, one group": (
        "Mamba2",
        {**SIZES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "conv_kernel": 2, "tie_word_embeddings": True},
    ),
    "jamba": ("Jamba", {**HYBRID, "num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "jamba, other sizes": (
        "Jamba",
        {
            **HYBRID,
            "num_hidden_layers": 3,
            "attn_layer_offset": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 2,
            "mamba_expand": 1,
            "mamba_dt_rank": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3 next": ("Qwen3Next", {**QWEN, "num_hidden_layers": 4, "mlp_only_layers": [0, 1, 2, 3]}),
    "qwen3 next, other sizes": (
        "Qwen3Next",
        {
            **QWEN,
            "num_experts": 0,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_num_key_heads": 4,
            "linear_conv_kernel_dim": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    ),
    "jamba with experts": ("Jamba", {**HYBRID, "num_hidden_layers": 4, "num_experts": 4, "attn_layer_offset": 1}),
    "jamba, experts everywhere": (
        "Jamba",
        {
            **HYBRID,
            "num_hidden_layers": 3,
            "attn_layer_offset": 2,
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
        },
    ),
    "qwen3 next with experts": (
        "Qwen3Next",
        {
            **QWEN,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "recurrent gemma": ("RecurrentGemma", {**GRIFFIN, "num_hidden_layers": 4, "attention_window_size": 6}),
    "recurrent gemma, other sizes": (
        "RecurrentGemma",
        {
            **GRIFFIN,
            "lru_width": 48,
            "conv1d_width": 2,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "block_types": ["attention", "recurrent"],
            "logits_soft_cap": 5.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        },
    ),
    "rwkv": ("Rwkv", {**SIZES, "num_hidden_layers": 3}),
    "rwkv, other sizes": (
        "Rwkv",
        {**SIZES, "intermediate_size": 40, "rescale_every": 1, "tie_word_embeddings": True},
    ),
    # its cache in transformers needs keys and values whose width is a multiple of 64
    "xlstm": ("xLSTM", {**SIZES, "hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0}),
    "xlstm, other sizes": (
        "xLSTM",
        {
            **SIZES,
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "qk_dim_factor": 1.0,
            "v_dim_factor": 0.5,
            "gate_soft_cap": 3.0,
            "output_logit_soft_cap": 5.0,
            "ffn_round_up_to_multiple_of": 10,
        },
    ),
}


def original(name: str) -> Any:
    """Build a model of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("jamba", {"mamba_conv_bias": False}, "`mamba_conv_bias` = False, which this version cannot express"),
        ("qwen3 next", {"attention_bias": True}, "`attention_bias` = True, which this version cannot express"),
        ("mamba", {"use_bias": True}, "`use_bias` = True, which this version cannot express"),
        ("mamba", {"hidden_act": "relu"}, "`hidden_act` = 'relu', which this version cannot express"),
        ("mamba", {"expand": 1.5}, "`expand` = 1.5, which this version cannot express; allowed are 1"),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, r"`time_step_limit` = \[0.0, 1.0\], which this version cannot"),
        ("mamba2", {"num_heads": 4}, "`num_heads` = 4, which this version cannot express; allowed are 8"),
        ("xlstm", {"use_bias": True}, "`use_bias` = True, which this version cannot express"),
        ("rwkv", {"layer_norm_epsilon": 0.1}, "`layer_norm_epsilon` = 0.1, which this version cannot express"),
    ],
)
def test_what_is_refused(name: str, entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    original(name).config.save_pretrained(tmp_path)
    configure(tmp_path, **entries)
    with pytest.raises(ConfigError, match=words):
        load_pretrained(tmp_path)


@torch.no_grad()
def test_experts_that_no_layer_has(tmp_path: Path) -> None:
    """A number of experts says nothing if no layer is a place of theirs."""
    original("jamba").save_pretrained(tmp_path)
    wanted = load_pretrained(tmp_path)
    configure(tmp_path, num_experts=8, expert_layer_period=9, expert_layer_offset=8)
    ids = torch.randint(0, 60, (1, 8))
    assert torch.equal(load_pretrained(tmp_path)(ids), wanted(ids))


@pytest.mark.parametrize(
    ("name", "entries", "without"),
    [
        (
            "mamba",
            {
                "time_step_rank": "auto", "intermediate_size": 64, "d_inner": 64, "d_model": 32, "n_layer": 2,
                "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
            },
            (),
        ),
        ("mamba2", {"time_step_limit": [0.0, float("inf")], "norm_before_gate": True, "rms_norm": True}, ()),
        ("xlstm", {"embedding_dim": 64, "num_blocks": 2, "add_qk_norm": False}, ("hidden_size", "num_hidden_layers")),
        (
            "recurrent gemma",
            {
                "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "embeddings_scale_by_sqrt_dim": True,
                "final_w_init_variance_scale": 0.1, "head_dim": 8,
            },
            ("rope_parameters", "lru_width"),
        ),
        ("jamba", {"mamba_dt_rank": "auto", "mamba_inner_layernorms": True, "sliding_window": None}, ()),
        (
            "qwen3 next",
            {"full_attention_interval": 4, "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_scaling": None},
            ("layer_types", "rope_parameters"),
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_older_configurations(name: str, entries: dict[str, Any], without: tuple[str, ...], tmp_path: Path) -> None:
    """Entries of earlier releases, and a model that was saved without its head, whose names have no prefix."""
    model, ids = original(name), torch.randint(3, 60, (2, 8))
    model.base_model.save_pretrained(tmp_path)
    tied = model.config.tie_word_embeddings
    if not tied:
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({**tensors, "lm_head.weight": model.lm_head.weight.contiguous()}, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**kept, **entries}))
    wanted = model(ids).logits
    assert (load_pretrained(tmp_path)(ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_the_first_name_of_embeddings(tmp_path: Path) -> None:
    original("mamba").save_pretrained(tmp_path)
    ids, wanted = torch.randint(3, 60, (2, 8)), load_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(ids), wanted(ids))


@torch.no_grad()
def test_fused_maps_of_an_xlstm(tmp_path: Path) -> None:
    """Maps of one input are one tensor; transformers itself cannot build such models."""
    single, fused, again = (tmp_path / name for name in ("single", "fused", "again"))
    original("xlstm").save_pretrained(single)
    tensors, joined = load_file(single / "model.safetensors"), {}
    for whole, parts in (
        ("mlstm_layer.qkv_opreact.weight", ("q", "k", "v", "ogate_preact")),
        ("mlstm_layer.ifgate_preact.weight", ("igate_preact", "fgate_preact")),
        ("mlstm_layer.ifgate_preact.bias", ("igate_preact", "fgate_preact")),
        ("ffn.proj_up_gate_z.weight", ("proj_up_gate", "proj_up")),
    ):
        layer, _, kind = whole.split(".")
        for block in range(2):
            prefix = f"backbone.blocks.{block}."
            own = [tensors.pop(f"{prefix}{layer}.{part}.{kind}") for part in parts]
            joined[prefix + whole] = torch.cat(own)
    fused.mkdir()
    save_file({**tensors, **joined}, fused / "model.safetensors")
    (fused / "config.json").write_text((single / "config.json").read_text())
    configure(fused, weight_mode="fused")
    ids, model = torch.randint(0, 60, (1, 8)), load_pretrained(fused)
    assert torch.equal(model(ids), load_pretrained(single)(ids))
    model.save_pretrained(again, format="hf")
    written = load_file(again / "model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in {**tensors, **joined}.items())


@torch.no_grad()
def test_states_have_no_longest_row(tmp_path: Path) -> None:
    """A Mamba has no positions that end: it generates on, also in a static cache."""
    original("mamba").save_pretrained(tmp_path)
    model = AutoregressiveWrapper(load_pretrained(tmp_path))
    prompt = torch.randint(3, 60, (1, 4))
    wanted = model.generate(prompt, 12, temperature=0.0, cache_kv=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(prompt, 12, temperature=0.0, cache=cache), wanted)


PLAIN: dict[str, Any] = {"use_rmsnorm": True, "norm_eps": 1e-5, "norm_add_unit_offset": False, "verbose": False}


def trained(**options: Any) -> TransformerWrapper:
    stack = Decoder(**{"dim": 32, "depth": 2, "heads": 4, **PLAIN, **options})
    return TransformerWrapper(num_tokens=60, max_seq_len=0, use_abs_pos_emb=False, attn_layers=stack).eval()


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({"mixer": "mamba", "only_attn": True}, "mamba"),
        (
            {"mixer": "mamba2", "only_attn": True, "mixer_head": 8, "mixer_norm_unit_offset": False, "depth": 1},
            "mamba2",
        ),
    ],
)
@torch.no_grad()
def test_models_that_were_trained_here(options: dict[str, Any], family: str, tmp_path: Path) -> None:
    model, ids = trained(**options), torch.randint(3, 60, (2, 8))
    model.save_pretrained(tmp_path, format="hf")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer": "retention", "only_attn": True}, "no family of transformers has the options of this model"),
        ({"mixer": "mamba2", "only_attn": True, "mixer_head": 8}, r"`mixer_norm_unit_offset` = True \(False there\)"),
        ({"mixer": "mamba", "only_attn": True, "mixer_expand": 1.5}, "no family of transformers has"),
        ({"mixer": "mamba"}, "differs in `layers` = 'mfmf'"),
    ],
)
def test_what_no_family_has(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(**options).save_pretrained(tmp_path, format="hf")


@torch.no_grad()
def test_options_on_top_of_loaded_weights(tmp_path: Path) -> None:
    """Other heads of the same shapes of weights are written as such, and options of no family are named."""
    original("qwen3 next").save_pretrained(tmp_path)
    ids, loaded = torch.randint(3, 60, (2, 8)), load_pretrained(tmp_path)

    def changed(**options: Any) -> Any:
        config = loaded.config
        config["options"]["attn_layers"]["options"].update(options)
        model = TransformerWrapper.from_config(config).eval()
        model.load_state_dict(loaded.state_dict())
        model.pretrained_config = loaded.pretrained_config
        return model

    model = changed(mixer_key_heads=4, mixer_dim_key=3)
    assert not torch.allclose(model(ids), loaded(ids))
    model.save_pretrained(tmp_path / "heads", format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "heads").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"differs in `mixer_negative` = True \(False there\)"):
        changed(mixer_negative=True).save_pretrained(tmp_path / "negative", format="hf")
