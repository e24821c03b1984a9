"""Models by name: decoders with the options of today's language models, in five sizes and one for bytes.

All have rotary positions, RMSNorm of queries and keys, no biases, and sublayers that start as the identity
(2002.10745). The sizes from `10m` on also have RMSNorm and SwiGLU, as Llama (2302.13971). `tiny` and `bytes` have
LayerNorm and GELU, which are faster on a CPU, and shift half of the features by a token.

What brought the models of up to a million parameters furthest, in bits per byte of a sample of held-out source of the
standard library after 300 steps: shifted features (of a model of bytes, after 250 steps: from 2.35 to 2.16, for two
percent more time); a trained vocabulary of 2,048 tokens instead of bytes, in a narrower model with as many parameters
(from 2.08 to 1.73); an embedding that learns at 0.4 instead of 0.1 (from 1.69 to 1.65); value residuals (from 1.68 to
1.66).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.errors import ConfigError, Faults
from x_transformers.layers.named_stacks import Decoder
from x_transformers.models.transformer import TransformerWrapper


@dataclass(frozen=True)
class Preset:
    """A model, and how it is trained unless flags say otherwise.

    Attributes:
        layers: keywords of the `Decoder`.
        model: keywords of the `TransformerWrapper`.
        context: number of tokens in a window.
        rows: windows in a step.
        vocabulary: number of tokens of a tokenizer that is trained for it.
        muon_lr: peak learning rate of the matrices of the layers, with Muon.
        lr: peak learning rate of AdamW: of all parameters, or of those that Muon does not train.
        embedding_lr: of the tables of embeddings, in a run with Muon.
        schedule, warmup, clip: see `Settings`.
        minutes: duration of a run.
    """

    layers: dict[str, Any]
    context: int
    rows: int
    vocabulary: int
    model: dict[str, Any] = field(default_factory=dict)
    muon_lr: float = 0.02
    lr: float = 1e-3
    embedding_lr: float = 1e-2
    schedule: str = "cosine"
    warmup: float = 0.02
    clip: float = 1.0
    minutes: float = 10.0

    @property
    def tokenizer(self) -> str:
        """Kind of the tokenizer."""
        return "bytes" if self.vocabulary == 256 else "bpe"


MODERN = {
    "rotary_pos_emb": True,
    "attn_qk_rmsnorm": True,
    "attn_zero_init_output": True,
    "ff_zero_init_output": True,
    "ff_no_bias": True,
}
SMALL = {**MODERN, "depth": 4, "heads": 4, "attn_dim_head": 32, "rotary_emb_dim": 32, "shift_tokens": 1}
LLAMA = {**MODERN, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "ff_mult": 8 / 3}


def _llama(dim: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    head = dim // heads
    return {**LLAMA, "dim": dim, "depth": depth, "heads": heads, **more, "attn_dim_head": head, "rotary_emb_dim": head}


PRESETS = {
    "bytes": Preset(
        {**SMALL, "dim": 128},
        context=128,
        rows=8,
        vocabulary=256,
        lr=0.01,
        embedding_lr=0.05,
        schedule="linear",
        warmup=0.0,
        clip=0.0,
        minutes=1.5,
    ),
    "tiny": Preset(
        {**SMALL, "dim": 104, "add_value_residual": True},
        context=128,
        rows=8,
        vocabulary=2048,
        lr=0.03,
        embedding_lr=0.4,
        schedule="linear",
        warmup=0.0,
        clip=0.0,
        minutes=1.5,
    ),
    "10m": Preset(_llama(256, 10, 4), context=256, rows=16, vocabulary=4096, lr=5e-3, embedding_lr=0.02),
    "124m": Preset(
        _llama(768, 12, 12), context=1024, rows=64, vocabulary=50_304, model={"tie_embedding": True}, embedding_lr=2e-3
    ),
    "350m": Preset(
        _llama(1024, 24, 16),
        context=1024,
        rows=128,
        vocabulary=50_304,
        model={"tie_embedding": True},
        embedding_lr=2e-3,
    ),
    "1b": Preset(
        _llama(2048, 16, 32, attn_kv_heads=8, ff_mult=4),
        context=2048,
        rows=256,
        vocabulary=65_536,
        muon_lr=0.01,
        lr=5e-4,
        embedding_lr=2e-3,
    ),
}
"""Number of parameters, with the vocabulary of the preset: 0.99 and 0.85, then 10, 124, 354 and 1,240 million."""


def build_model(
    preset: str,
    vocabulary: int,
    context: int,
    options: Mapping[str, Any] | None = None,
    *,
    loss_chunk_size: int | None = None,
) -> AutoregressiveWrapper:
    """Build the model of a preset, initialized for its optimizers.

    Args:
        preset: one of `PRESETS`.
        vocabulary: number of tokens.
        context: number of tokens in a window.
        options: keywords of `TransformerWrapper` or `Decoder` that replace or complete those of the preset.
        loss_chunk_size: of `AutoregressiveWrapper`.

    Raises:
        ConfigError: if there is no such preset, or an option is unknown or does not fit.
    """
    if preset not in PRESETS:
        raise ConfigError(f"`preset` is {preset!r}; it must be one of {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    model, layers = _sorted_options(options or {})
    of_preset = dict(chosen.layers)
    if not layers.get("rotary_pos_emb", True):
        del of_preset["rotary_emb_dim"]
    decoder = Decoder(**{**of_preset, **layers})
    given = {"num_tokens": vocabulary, "max_seq_len": context, **chosen.model, **model}
    net = TransformerWrapper(**given, attn_layers=decoder)
    _initialize(net)
    return AutoregressiveWrapper(net, loss_chunk_size=loss_chunk_size)


def _sorted_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of the model and those of its layers."""
    of_model, of_layers = (set(inspect.signature(kind).parameters) for kind in (TransformerWrapper, Decoder))
    faults = Faults()
    for name in options:
        if name in ("num_tokens", "max_seq_len", "attn_layers"):
            faults.add(f"`{name}` is set by the run: use --vocabulary, --context or options of the layers instead.")
        elif name not in of_model | of_layers:
            faults.add_unknown(name, of_model | of_layers)
    faults.raise_if_any("--set")
    return (
        {name: value for name, value in options.items() if name in of_model},
        {name: value for name, value in options.items() if name not in of_model},
    )


def _initialize(net: TransformerWrapper) -> None:
    """Give a table of its own unit variance, and start with all tokens equally likely."""
    embedding: Any = net.token_emb
    table = embedding.emb.weight
    if isinstance(net.to_logits, nn.Linear) and net.to_logits.weight is not table:
        nn.init.normal_(table, std=1.0)
        nn.init.normal_(net.to_logits.weight, std=1e-4)
    else:  # the table is also that of the head
        nn.init.normal_(table, std=0.02)


def read_setting(text: str) -> tuple[str, Any]:
    """Read `key=value`: a keyword, and a value as JSON writes it, or a word.

    Args:
        text: of the command line.

    Raises:
        ConfigError: if there is no `=` in it.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set is given {text!r}; it must be of the form keyword=value.")
    words = {"True": True, "False": False, "None": None}
    try:
        found = words[value] if value in words else json.loads(value)
    except ValueError:
        return name, value
    return name, tuple(found) if isinstance(found, list) else found
