"""Whisper of transformers, tiny and random: the same features, logits and generated tokens."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import SpeechTransformer, load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NEW, START = 20, 3
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "num_mel_bins": 5,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 40,
    "decoder_attention_heads": 4,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "decoder_start_token_id": START,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("Whisper", SMALL),
    "whisper, other activation": ("Whisper", {**SMALL, "activation_function": "relu", "num_mel_bins": 7}),
}


def original(name: str, kind: str = "ForConditionalGeneration", **more: Any) -> Any:
    """Build a model of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords, **more)
    model = getattr(transformers, f"{family}{kind}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_logits_and_generated_tokens(name: str, tmp_path: Path) -> None:
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert isinstance(ours, SpeechTransformer)
    audio, target = torch.randn(2, theirs.config.num_mel_bins, 24), torch.randint(4, 60, (2, 7))
    wanted = theirs(audio, decoder_input_ids=target)
    features, mask = ours.encode(audio)
    assert mask is None
    near(features, wanted.encoder_last_hidden_state)
    near(ours.decoder.net(target, context=features), wanted.logits)

    tokens = torch.full((2, 1), START)
    for _ in range(NEW):
        encoded = transformers.modeling_outputs.BaseModelOutput(features)
        logits = theirs(encoder_outputs=encoded, decoder_input_ids=tokens).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert ours.generate(audio, tokens[:, :1], NEW, temperature=0.0).tolist() == tokens[:, 1:].tolist()


@torch.no_grad()
def test_a_folder_of_a_model_without_its_head(tmp_path: Path) -> None:
    theirs = original("whisper", "Model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, audio = load_pretrained(tmp_path / "theirs"), torch.randn(1, 5, 24)
    target = torch.randint(4, 60, (1, 7))
    wanted = theirs(audio, decoder_input_ids=target).last_hidden_state
    near(ours.decoder.net(target, context=ours.encode(audio)[0], return_embeddings=True), wanted)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(audio, target), ours(audio, target))
    windowed = load_pretrained(tmp_path / "theirs", **{"decoder.attn_layers.attn_max_attend_past": 100})
    near(windowed(audio, target), ours(audio, target))


@torch.no_grad()
def test_what_is_not_read(tmp_path: Path) -> None:
    original("whisper", "ForAudioClassification").save_pretrained(tmp_path / "classes")
    with pytest.raises(ConfigError, match=r"`architectures` = \['WhisperForAudioClassification'\], whose head"):
        load_pretrained(tmp_path / "classes")
    original("whisper", scale_embedding=True).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConfigError, match="`scale_embedding` = True"):
        load_pretrained(tmp_path / "scaled")
