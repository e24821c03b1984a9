"""The reference's import path. Everything here lives elsewhere."""

from x_transformers.attend import Attend
from x_transformers.attention.attention import Attention
from x_transformers.attention.qk.caller_rotations import apply_polar_pos_emb, apply_rotary_pos_emb, rotate_half
from x_transformers.attention.qk.normalize import MultiheadRMSNorm
from x_transformers.attention.qk.polar import PolarEmbedding
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.scores.alibi import AlibiPositionalBias
from x_transformers.attention.scores.cope import CoPE
from x_transformers.attention.scores.dynamic import DynamicPositionBias
from x_transformers.attention.scores.forgetting import DataDependentAlibi, PerRowDataDependentAlibi
from x_transformers.attention.scores.relative_projection import RelativeProjPositionalBias
from x_transformers.attention.scores.t5 import RelativePositionBias
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.decoding.prompts import pad_at_dim
from x_transformers.encoder_decoder import XTransformer
from x_transformers.feedforward.activations import ReluSquared, SoLU
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.feedforward.glu import GLU
from x_transformers.feedforward.softclamp import softclamp_gelu, softclamp_silu
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.attention_pool import AttentionPool
from x_transformers.layers.depth.aggregated import AttentionResidual
from x_transformers.layers.depth.lime import DynamicLIMe
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.named_stacks import (
    CrossAttender,
    Decoder,
    Encoder,
    PrefixDecoder,
    TransformerBlock,
)
from x_transformers.layers.residuals.gated import GRUGating
from x_transformers.layers.residuals.mv_split import MVSplitResidualUpdate
from x_transformers.layers.residuals.orthogonal import OrthogonalResidualUpdate
from x_transformers.layers.residuals.plain import Residual
from x_transformers.layers.residuals.streams import GatedMultiResidual, HyperConnection, sinkhorn
from x_transformers.layers.unet import ConcatCombine
from x_transformers.layers.wrappers import AdaptiveLayerScale, FoldAxially, LayerScale, Scale, ShiftTokens, shift
from x_transformers.models.embeddings import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding, TokenEmbedding
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.requested_outputs import calc_entropy, calc_z_loss
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.models.vision import ViTransformerWrapper
from x_transformers.modules import script_names
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.lora import LoRALinear
from x_transformers.modules.norms import (
    AdaptiveLayerNorm,
    AdaptiveRMSNorm,
    Derf,
    DynamicTanh,
    LayerNorm,
    RMSNorm,
    ScaleNorm,
    SimpleRMSNorm,
)
from x_transformers.modules.script_names import *  # noqa: F403
from x_transformers.ops import l2norm, log, masked_mean, max_neg_value, softclamp
from x_transformers.ops import project_away as orthog_project
from x_transformers.options.per_layer import layer_schedule

__getattr__ = names_of(__name__)

__all__ = [
    "GLU",
    "AbsolutePositionalEmbedding",
    "AdaptiveLayerNorm",
    "AdaptiveLayerScale",
    "AdaptiveRMSNorm",
    "AlibiPositionalBias",
    "Attend",
    "Attention",
    "AttentionLayers",
    "AttentionPool",
    "AttentionResidual",
    "AutoregressiveWrapper",
    "CoPE",
    "ConcatCombine",
    "CrossAttender",
    "DataDependentAlibi",
    "Decoder",
    "Derf",
    "DynamicLIMe",
    "DynamicPositionBias",
    "DynamicTanh",
    "Encoder",
    "FeedForward",
    "FoldAxially",
    "GRUGating",
    "GatedMultiResidual",
    "HyperConnection",
    "Intermediates",
    "LayerIntermediates",
    "LayerNorm",
    "LayerScale",
    "LinearNoBias",
    "LoRALinear",
    "MVSplitResidualUpdate",
    "MultiheadRMSNorm",
    "OrthogonalResidualUpdate",
    "PerRowDataDependentAlibi",
    "PolarEmbedding",
    "PrefixDecoder",
    "RMSNorm",
    "RelativePositionBias",
    "RelativeProjPositionalBias",
    "ReluSquared",
    "Residual",
    "RotaryEmbedding",
    "Scale",
    "ScaleNorm",
    "ScaledSinusoidalEmbedding",
    "ShiftTokens",
    "SimpleRMSNorm",
    "SoLU",
    "TokenEmbedding",
    "TransformerBlock",
    "TransformerWrapper",
    "ViTransformerWrapper",
    "XTransformer",
    "apply_polar_pos_emb",
    "apply_rotary_pos_emb",
    "calc_entropy",
    "calc_z_loss",
    "l2norm",
    "layer_schedule",
    "log",
    "masked_mean",
    "max_neg_value",
    "orthog_project",
    "pad_at_dim",
    "rotate_half",
    "shift",
    "sinkhorn",
    "softclamp",
    "softclamp_gelu",
    "softclamp_silu",
]
__all__ += script_names.__all__
