"""Encoders with decoders of transformers, tiny and random: the same features, logits and generated tokens."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import XTransformer, load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS, NEW, START = 10, 20, 3
T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": START,
}
BART: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 40,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5),
    "flan t5": (
        "T5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1, "d_kv": 12},
    ),
    "bart": ("Bart", BART),
    "bart, scaled": ("Bart", {**BART, "scale_embedding": True, "activation_function": "relu"}),
}


def original(name: str, kind: str = "ForConditionalGeneration") -> Any:
    """Build a model of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords)
    model = getattr(transformers, f"{family}{kind}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), getattr(model, "final_logits_bias", torch.zeros(1))):
            tensor += 0.2 * torch.randn_like(tensor)
    return model


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_logits_and_generated_tokens(name: str, tmp_path: Path) -> None:
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert isinstance(ours, XTransformer)
    source, target = torch.randint(4, 60, (2, TOKENS)), torch.randint(4, 60, (2, 7))
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, TOKENS - 4])[:, None]
    wanted = theirs(source, attention_mask=mask.long(), decoder_input_ids=target)
    features = ours.encoder(source, mask=mask)
    near(features[mask], wanted.encoder_last_hidden_state[mask])
    near(ours.decoder.net(target, context=features, context_mask=mask), wanted.logits)

    wanted = theirs.generate(
        source, attention_mask=mask.long(), max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=None
    )
    start = torch.full((2, 1), START)
    got = ours.generate(source, start, NEW, mask=mask, temperature=0.0)
    assert got.tolist() == wanted[:, 1:].tolist()


@torch.no_grad()
def test_a_model_without_its_bias_of_logits(tmp_path: Path) -> None:
    theirs = original("bart", "Model")
    theirs.save_pretrained(tmp_path)
    ours, source, target = load_pretrained(tmp_path), torch.randint(4, 60, (2, TOKENS)), torch.randint(4, 60, (2, 7))
    wanted = theirs(source, decoder_input_ids=target).last_hidden_state
    near(ours.decoder.net(target, context=ours.encoder(source), return_embeddings=True), wanted)


@torch.no_grad()
def test_a_class_that_is_not_read(tmp_path: Path) -> None:
    original("bart", "ForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"`architectures` = \['BartForSequenceClassification'\], whose head"):
        load_pretrained(tmp_path)
