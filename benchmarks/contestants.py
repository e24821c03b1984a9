"""Contestants: the same decoders from bare PyTorch, this library and Hugging Face's transformers, with equal weights.

There are two families: GPT (`bare`, `ours`, `GPT-2`) and Llama (`bare Llama`, `our Llama`, `Llama`). GPT-2 has an
untied head and no dropout; its additional biases are zero, as are the biases that our Llama has in its gated
feedforwards. `benchmarks.agreement` checks that they compute the same, GPT-2 with the GELU of the others; afterwards
GPT-2 gets its own GELU back (`as_shipped`). Hugging Face's models are called as their users call them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import bare as bare_module
from benchmarks.bare import BareGPT, Shape
from benchmarks.bare_llama import EPS, BareLlama, inner_width
from benchmarks.weights import share_gpt, share_llama
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

LLAMA: dict[str, Any] = {
    "rotary_pos_emb": True,
    "use_rmsnorm": True,
    "ff_glu": True,
    "ff_swish": True,
    "ff_no_bias": True,
    "ff_glu_no_bias": True,
}
GPT_NAMES, LLAMA_NAMES = ("bare", "ours", "GPT-2"), ("bare Llama", "our Llama", "Llama")
DYNAMIC = "ours, dynamic cache"

Generate = Callable[[Tensor, int, str | None], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A model, and the functions of it that are measured.

    Attributes:
        model: module with the parameters.
        logits: maps tokens `(b, n)` to logits `(b, n, v)`.
        loss: maps tokens `(b, n)` to the mean cross-entropy of all tokens but the first.
        generate: maps a prompt `(b, n)`, the number of new tokens, and a compiler backend (None for eager) to the
            greedy continuation.
    """

    model: nn.Module
    logits: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    generate: Generate


def gpts(shape: Shape) -> dict[str, Contestant]:
    """Build the bare model, ours, and GPT-2, with the same weights."""
    bare, ours, other = BareGPT(shape), our_gpt(shape), gpt2(shape)
    share_gpt(bare, ours.net, other)
    return dict(zip(GPT_NAMES, (of_bare(bare), of_ours(ours), of_hugging_face(other)), strict=True))


def llamas(shape: Shape) -> dict[str, Contestant]:
    """Build the bare Llama, ours and Hugging Face's, with the same weights."""
    bare, ours, other = BareLlama(shape), our_llama(shape), llama(shape)
    share_llama(bare, ours.net, other)
    return dict(zip(LLAMA_NAMES, (of_bare(bare), of_ours(ours), of_hugging_face(other)), strict=True))


def our_gpt(shape: Shape, *, loss_chunk_size: int | None = None, **stack: Any) -> AutoregressiveWrapper:
    """Build our GPT of this shape, with more keywords for its decoder."""
    layers = Decoder(
        **{
            "dim": shape.dim,
            "depth": shape.layers,
            "heads": shape.heads,
            "attn_dim_head": shape.dim // shape.heads,
            "ff_no_bias": not shape.bias,
            "verbose": False,
            **stack,
        }
    )
    net = TransformerWrapper(num_tokens=shape.vocab, max_seq_len=shape.context, attn_layers=layers)
    return AutoregressiveWrapper(net, loss_chunk_size=loss_chunk_size)


def our_llama(shape: Shape) -> AutoregressiveWrapper:
    mult = inner_width(shape.dim) / shape.dim
    return our_gpt(shape, rotary_emb_dim=shape.dim // shape.heads, ff_mult=mult, **LLAMA)


def gpt2(shape: Shape) -> nn.Module:
    """Build Hugging Face's GPT-2 without dropout, with an untied head and, until `as_shipped`, the others' GELU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.dim,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def as_shipped(model: nn.Module) -> None:
    """Give a GPT-2 its own GELU back, which approximates that of the others; other models stay as they are."""
    from transformers.activations import ACT2FN

    for module in model.modules():
        if type(module).__name__ == "GPT2MLP":
            module.act = ACT2FN["gelu_new"]


def llama(shape: Shape) -> nn.Module:
    """Build Hugging Face's Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        intermediate_size=inner_width(shape.dim),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=EPS,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def of_bare(model: BareGPT | BareLlama) -> Contestant:
    """Return the bare model as a contestant; it compiles its decoding step once per backend."""

    def generate(prompt: Tensor, new: int, backend: str | None) -> Tensor:
        return bare_module.generate(model, prompt, new, compiled_step(backend) if backend else None)

    steps: dict[str, Callable[..., Tensor]] = {}

    def compiled_step(backend: str) -> Callable[..., Tensor]:
        if backend not in steps:
            steps[backend] = torch.compile(model.decode_one, backend=backend, fullgraph=True)
        return steps[backend]

    return Contestant(model, model, partial(next_token_loss, model), generate)


def of_ours(model: AutoregressiveWrapper, cache: str = "static") -> Contestant:
    """Return a model of this library as a contestant."""

    def generate(prompt: Tensor, new: int, backend: str | None) -> Tensor:
        compiled = {"backend": backend} if backend else False
        return model.generate(prompt, new, temperature=0.0, cache=cache, compile=compiled)

    return Contestant(model, model.net, model, generate)


def of_hugging_face(model: nn.Module) -> Contestant:
    """Return a model of Hugging Face's as a contestant."""

    def logits(tokens: Tensor) -> Tensor:
        return model(tokens).logits

    def loss(tokens: Tensor) -> Tensor:
        return model(tokens, labels=tokens).loss

    def generate(prompt: Tensor, new: int, backend: str | None) -> Tensor:
        given: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new}
        if backend:
            given |= {"cache_implementation": "static", "compile_config": compile_config(backend)}
        return model.generate(prompt, min_new_tokens=new, do_sample=False, **given)[:, prompt.shape[1] :]

    return Contestant(model, logits, loss, generate)


def next_token_loss(logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of all tokens but the first."""
    return F.cross_entropy(logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def compile_config(backend: str) -> Any:
    """Return Hugging Face's settings for a compiled decoding step, which also apply on a CPU."""
    from transformers import CompileConfig

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return config
