"""Transformers composed from keywords: one paper, one option, every combination right or refused."""

from x_transformers.attention.attention import Attention
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.belief_state_wrapper import BeliefStateWrapper
from x_transformers.continuous import ContinuousAutoregressiveWrapper
from x_transformers.dpo import DPO
from x_transformers.encoder_decoder import XTransformer
from x_transformers.entropy_based_tokenizer import EntropyBasedTokenizer
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.layers.attention_pool import AttentionPool
from x_transformers.layers.early_exit import EarlyExit
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.named_stacks import (
    CrossAttender,
    Decoder,
    Encoder,
    PrefixDecoder,
    TransformerBlock,
)
from x_transformers.models.continuous import ContinuousTransformerWrapper
from x_transformers.models.ensemble import ensemble
from x_transformers.models.grow_param_tokens import grow_param_tokens_
from x_transformers.models.multi_input import MultiInputTransformerWrapper
from x_transformers.models.neo_mlp import NeoMLP
from x_transformers.models.to_experts import to_experts
from x_transformers.models.to_recursive import to_recursive
from x_transformers.models.to_rmsnorm import to_crmsnorm, to_rmsnorm
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.models.vision import ViTransformerWrapper
from x_transformers.models.xval import XValTransformerWrapper
from x_transformers.modules.norms import AdaptiveRMSNorm, RMSNorm
from x_transformers.next_latent_wrapper import NextLatentWrapper
from x_transformers.nonautoregressive_wrapper import NonAutoregressiveWrapper
from x_transformers.ops import default_device
from x_transformers.options.per_layer import layer_schedule
from x_transformers.pretrained import writing as _writing  # noqa: F401  # enters the format "hf"
from x_transformers.pretrained.loading import load_pretrained
from x_transformers.speech_transformer import SpeechTransformer
from x_transformers.xl_autoregressive_wrapper import XLAutoregressiveWrapper
from x_transformers.xval import XValAutoregressiveWrapper

__version__ = "3.0.0"

__all__ = [
    "DPO",
    "AdaptiveRMSNorm",
    "Attention",
    "AttentionLayers",
    "AttentionPool",
    "AutoregressiveWrapper",
    "BeliefStateWrapper",
    "ContinuousAutoregressiveWrapper",
    "ContinuousTransformerWrapper",
    "CrossAttender",
    "Decoder",
    "EarlyExit",
    "Encoder",
    "EntropyBasedTokenizer",
    "FeedForward",
    "MultiInputTransformerWrapper",
    "NeoMLP",
    "NextLatentWrapper",
    "NonAutoregressiveWrapper",
    "PrefixDecoder",
    "RMSNorm",
    "SpeechTransformer",
    "TransformerBlock",
    "TransformerWrapper",
    "ViTransformerWrapper",
    "XLAutoregressiveWrapper",
    "XTransformer",
    "XValAutoregressiveWrapper",
    "XValTransformerWrapper",
    "default_device",
    "ensemble",
    "grow_param_tokens_",
    "layer_schedule",
    "load_pretrained",
    "to_crmsnorm",
    "to_experts",
    "to_recursive",
    "to_rmsnorm",
]


def __dir__() -> list[str]:
    """Return the public names; modules are found by their paths."""
    return sorted([*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"])
