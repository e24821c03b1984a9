"""DistilBERT (1910.01108): BERT with half of its layers and without types of tokens."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.encoder import EncoderNames, encoder_outline

NAMES = EncoderNames(
    prefix="distilbert.",
    embeddings="embeddings.",
    block="transformer.layer.{}.",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    norms=("sa_layer_norm", "output_layer_norm"),
    transform="vocab_transform",
    transform_norm="vocab_layer_norm",
    head="vocab_projector",
    head_bias="vocab_projector.bias",
)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    # sinusoids were only the first values of the table
    settings.skip("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds")
    settings.skip("tie_weights_")
    settings.rename(
        dim="hidden_size",
        hidden_dim="intermediate_size",
        n_layers="num_hidden_layers",
        n_heads="num_attention_heads",
        activation="hidden_act",
    )
    settings.entries.setdefault("hidden_act", "gelu")
    return encoder_outline(settings, NAMES, eps=1e-12)
