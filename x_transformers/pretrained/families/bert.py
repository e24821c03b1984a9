"""BERT (1810.04805), RoBERTa (1907.11692) and ELECTRA (2003.10555): types of tokens, and norms after the residual."""

from __future__ import annotations

from dataclasses import replace

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.encoder import EncoderNames, encoder_outline

BERT = EncoderNames(
    prefix="bert.",
    embeddings="embeddings.",
    block="encoder.layer.{}.",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    transform="cls.predictions.transform.dense",
    transform_norm="cls.predictions.transform.LayerNorm",
    head="cls.predictions.decoder",
    head_bias="cls.predictions.bias",
    pool="pooler.dense",
)
ROBERTA = replace(
    BERT,
    prefix="roberta.",
    transform="lm_head.dense",
    transform_norm="lm_head.layer_norm",
    head="lm_head.decoder",
    head_bias="lm_head.bias",
)
ELECTRA = replace(
    BERT,
    prefix="electra.",
    transform="generator_predictions.dense",
    transform_norm="generator_predictions.LayerNorm",
    head="generator_lm_head",
    head_bias="generator_lm_head.bias",
    pool="",
)
POOL = ("pooler.dense.weight", "pooler.dense.bias")


def read_bert(settings: Settings) -> Outline:
    """Return the outline of a BERT."""
    _skip(settings)
    eps = settings.take("layer_norm_eps", 1e-12)
    return encoder_outline(
        settings,
        BERT,
        eps=eps,
        unused=(*POOL, "cls.seq_relationship.weight", "cls.seq_relationship.bias", "cls.predictions.decoder.bias"),
    )


def read_roberta(settings: Settings) -> Outline:
    """Return the outline of a RoBERTa, whose positions begin after that of padding."""
    _skip(settings)
    eps, padding = settings.take("layer_norm_eps", 1e-12), settings.take("pad_token_id", 1)
    return encoder_outline(
        settings,
        ROBERTA,
        eps=eps,
        first_row=padding + 1,
        head_activation="gelu",
        unused=(*POOL, "lm_head.decoder.bias"),
    )


def read_electra(settings: Settings) -> Outline:
    """Return the outline of an ELECTRA, whose embeddings may be narrower."""
    _skip(settings)
    settings.skip("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")
    eps = settings.take("layer_norm_eps", 1e-12)
    unused = tuple(f"discriminator_predictions.{name}" for name in DISCRIMINATOR)
    return encoder_outline(settings, ELECTRA, eps=eps, head_activation="gelu", unused=unused)


DISCRIMINATOR = ("dense.weight", "dense.bias", "dense_prediction.weight", "dense_prediction.bias")


def _skip(settings: Settings) -> None:
    """Skip what says nothing about the result."""
    settings.skip("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    settings.entries.setdefault("hidden_act", "gelu")
    settings.entries.setdefault("type_vocab_size", 2)
