"""Encoders of transformers, tiny and random: loaded from a folder, they have the same features and logits."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from x_transformers import load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS = 10
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24}
MODERN = {**SMALL, "local_attention": 6, "num_hidden_layers": 4}
"""Layers 1 and 2 have a window."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL),
    "bert, untied, other activation": ("Bert", {**SMALL, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "roberta": ("Roberta", {**SMALL, "type_vocab_size": 1, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", {**SMALL, "type_vocab_size": 1, "pad_token_id": 1, "num_hidden_layers": 1}),
    "camembert": ("Camembert", {**SMALL, "type_vocab_size": 1, "pad_token_id": 1, "num_hidden_layers": 1}),
    "distilbert": ("DistilBert", DISTIL),
    "electra": ("Electra", {**SMALL, "embedding_size": 16}),
    "electra, one width": ("Electra", {**SMALL, "embedding_size": 32}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert, all biases, untied": (
        "ModernBert",
        {
            **MODERN,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "tie_word_embeddings": False,
            "classifier_activation": "silu",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}


def original(name: str, kind: str) -> Any:
    """Build an encoder of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords)
    model = getattr(transformers, f"{family}{kind}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask; the second row has four tokens of padding on the right."""
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, TOKENS - 4])[:, None]
    return torch.randint(3, 60, (2, TOKENS)), mask


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_and_pooled_output(name: str, tmp_path: Path) -> None:
    theirs = original(name, "Model")
    theirs.save_pretrained(tmp_path)
    ours, (ids, mask) = load_pretrained(tmp_path), ragged()
    wanted = theirs(ids.where(mask, theirs.config.pad_token_id), attention_mask=mask.long())
    near(ours(ids, mask=mask, return_embeddings=True)[mask], wanted.last_hidden_state[mask])
    if getattr(wanted, "pooler_output", None) is not None:
        near(ours(ids, mask=mask), wanted.pooler_output)
    if getattr(theirs.config, "type_vocab_size", 0) > 1:
        kinds = torch.randint(0, 2, (2, TOKENS))
        wanted = theirs(ids, token_type_ids=kinds)
        near(ours(ids, embed_ids={"token_type": kinds}, return_embeddings=True), wanted.last_hidden_state)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    theirs = original(name, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    ours, (ids, mask) = load_pretrained(tmp_path), ragged()
    wanted = theirs(ids.where(mask, theirs.config.pad_token_id), attention_mask=mask.long()).logits
    near(ours(ids, mask=mask)[mask], wanted[mask])


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
@torch.no_grad()
def test_older_names_of_norms(kind: str, tmp_path: Path) -> None:
    """Files of the first release have other names of the parameters of norms, and more heads than one."""
    theirs = original("bert", kind)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    heads = ["cls.predictions.transform.LayerNorm.beta", "cls.seq_relationship.weight"]
    heads += ["bert.pooler.dense.bias"] if kind == "ForMaskedLM" else []
    extra = {name: torch.zeros(2) for name in heads if name not in tensors}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    ids = torch.randint(3, 60, (2, TOKENS))
    out = theirs(ids)
    near(load_pretrained(tmp_path)(ids), out.pooler_output if kind == "Model" else out.logits)


@torch.no_grad()
def test_first_configurations_of_modernbert(tmp_path: Path) -> None:
    """They name a period and two bases instead of each layer; rows are also padded on the left."""
    theirs = original("modernbert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    rotations = entries.pop("rope_parameters")
    assert entries.pop("layer_types") == ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    entries["global_attn_every_n_layers"] = 3
    entries["global_rope_theta"] = rotations["full_attention"]["rope_theta"]
    entries["local_rope_theta"] = rotations["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps({**entries, "position_embedding_type": "absolute", "layer_norm_eps": 1e-5}))
    ours, ids, start = load_pretrained(tmp_path), torch.randint(3, 60, (2, 20)), torch.tensor([0, 7])
    mask = torch.arange(20) >= start[:, None]
    wanted = theirs(ids, attention_mask=mask.long()).logits
    near(ours(ids, seq_start_pos=start)[mask], wanted[mask])
    ours.save_pretrained(tmp_path / "again", format="hf")
    near(transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "again").eval()(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_a_head_that_is_not_read(tmp_path: Path) -> None:
    original("bert", "ForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"`architectures` = \['BertForSequenceClassification'\], whose head"):
        load_pretrained(tmp_path)
