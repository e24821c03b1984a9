"""Models of transformers, tiny and random: loaded from a folder, they have the same logits and generate the same."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrained_encoders import CASES as ENCODERS
from test_pretrained_experts import CASES as EXPERTS
from test_pretrained_images import CASES as IMAGES
from test_pretrained_pairs import CASES as PAIRS
from test_pretrained_recurrent import CASES as RECURRENT
from test_pretrained_recurrent import UNPADDED
from test_pretrained_speech import CASES as SPEECH
from test_pretrained_towers import CASES as TOWERS

from x_transformers import AutoregressiveWrapper, load_pretrained
from x_transformers.pretrained.catalog import FAMILIES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS, NEW = 12, 20
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TRAINED = {"original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def rope(name: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": name, "rope_theta": 500.0, **more}}


LONG = rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 3.0, 4.0])
BY_KIND = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    },
    "query_pre_attn_scalar": 20,
}
FALCON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MPT = {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
OPT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, other details": (
        "GPT2",
        {**GPT2, "n_inner": 40, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    ),
    "llama": ("Llama", SMALL),
    "llama, tied, biases, llama3": (
        "Llama",
        {
            **SMALL,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **TRAINED),
        },
    ),
    "llama, one head": ("Llama", {**SMALL, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama, linear": ("Llama", {**SMALL, **rope("linear", factor=4.0)}),
    "llama, yarn": ("Llama", {**SMALL, **rope("yarn", factor=4.0, **TRAINED)}),
    "llama, dynamic": ("Llama", {**SMALL, **rope("dynamic", factor=4.0)}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2, windows": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "gemma": ("Gemma", {**SMALL, "head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            **SMALL,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("Gemma3Text", {**SMALL, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 4, **BY_KIND}),
    "gpt neox": ("GPTNeoX", NEOX),
    "gpt neox, one after the other": (
        "GPTNeoX",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False, **rope("linear", factor=2.0)},
    ),
    "phi": ("Phi", SMALL),
    "phi, all of the head rotated": ("Phi", {**SMALL, "partial_rotary_factor": 1.0, "num_key_value_heads": None}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "gptj, other details": ("GPTJ", {**GPT2, "rotary_dim": 8, "n_inner": 40, "activation_function": "gelu"}),
    "cohere": ("Cohere", {**SMALL, "logit_scale": 0.3}),
    "cohere, untied, biases": (
        "Cohere",
        {**SMALL, "tie_word_embeddings": False, "attention_bias": True, **rope("linear", factor=2.0)},
    ),
    "falcon, one key head": ("Falcon", FALCON),
    "falcon, one after the other": ("Falcon", {**FALCON, "parallel_attn": False, "bias": True}),
    "falcon, groups": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, groups, one norm": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon, alibi": (
        "Falcon",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 40},
    ),
    "mpt": ("Mpt", MPT),
    "mpt, three heads, scale": (
        "Mpt",
        {**MPT, "d_model": 24, "n_heads": 3, "attn_config": {"softmax_scale": 0.2}},
    ),
    "mpt, bounded": ("Mpt", {**MPT, "attn_config": {"clip_qkv": 0.5}}),
    "bloom": ("Bloom", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom, six heads": ("Bloom", {"vocab_size": 60, "hidden_size": 48, "n_layer": 1, "n_head": 6}),
    "opt": ("OPT", OPT),
    "opt, other details": (
        "OPT",
        {**OPT, "activation_function": "gelu", "enable_bias": False, "_remove_final_layer_norm": True},
    ),
    "phi3": ("Phi3", {**SMALL, "sliding_window": 6}),
    "phi3, longrope": ("Phi3", {**SMALL, "original_max_position_embeddings": 32, **LONG}),
    "starcoder2": ("Starcoder2", {**SMALL, "sliding_window": 6}),
    "starcoder2, no biases": ("Starcoder2", {**SMALL, "use_bias": False, "tie_word_embeddings": False}),
    "granite": (
        "Granite",
        {
            **SMALL,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": ("SmolLM3", {**SMALL, "num_hidden_layers": 4}),
    "olmo2": ("Olmo2", SMALL),
    **RECURRENT,
    **EXPERTS,
}


def original(name: str) -> Any:
    """Build a model of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords)
    # the eager attention of Falcon adds the bias twice
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for bias in (each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")):
            bias += 0.2 * torch.randn_like(bias)
    return model


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_every_family_is_tested() -> None:
    cases = [*CASES.values(), *ENCODERS.values(), *PAIRS.values(), *IMAGES.values(), *SPEECH.values(), *TOWERS.values()]
    tested = {getattr(transformers, f"{case[0]}Config").model_type for case in cases}
    assert tested == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_generated_tokens(name: str, tmp_path: Path) -> None:
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, TOKENS))
    near(ours(ids), theirs(ids).logits)

    # the second row has four tokens of padding on the left
    start = torch.tensor([0, 4])
    valid = torch.arange(TOKENS) >= start[:, None]
    ids, mask = ids.masked_fill(~valid, 0), valid.long()
    pos = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    if theirs.config.model_type in UNPADDED:
        rows = [ids[row : row + 1, first:] for row, first in enumerate(start)]
        logits = torch.cat([theirs(row).logits[0] for row in rows])
        wanted = [theirs.generate(row, **options)[0, row.shape[1] :].tolist() for row in rows]
    else:
        logits = theirs(ids, attention_mask=mask, position_ids=pos).logits[valid]
        wanted = theirs.generate(ids, attention_mask=mask, **options)[:, TOKENS:].tolist()
    near(ours(ids, seq_start_pos=start)[valid], logits)

    prompts = torch.stack((ids[0], ids[1].roll(-4)))
    got = AutoregressiveWrapper(ours).generate(prompts, NEW, temperature=0.0, prompt_lens=TOKENS - start)
    assert got.tolist() == wanted


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@torch.no_grad()
def test_shards_and_dtypes(name: str, tmp_path: Path) -> None:
    theirs = original(name).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 60, (2, TOKENS))
    half = theirs(ids).logits
    assert (ours(ids) - half).abs().max() < 0.05 * half.abs().max()
    # casting a model of transformers rounds its rotary frequencies as well
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    near(load_pretrained(tmp_path, dtype=torch.float32)(ids), wide(ids).logits)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in ours.parameters())


@torch.no_grad()
def test_a_model_saved_without_its_head(tmp_path: Path) -> None:
    theirs = original("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, TOKENS))
    near(load_pretrained(tmp_path)(ids), theirs(ids).logits)
