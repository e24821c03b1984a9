"""Hostile values for training objectives with latents, roll-outs and feedback, and for the models that they build.

`python tests/fuzz_objectives.py` tries everything; with a word, what has the word in its name.
"""

from __future__ import annotations

import sys
from typing import Any

import fuzz
import torch
from fuzz import LENGTH, VOCABULARY, Build, Call, features, ids, net

from x_transformers import Decoder
from x_transformers.discover_wrapper import DiscoverDecoder, TPREncoder
from x_transformers.free_transformer import BinaryMapper, FreeTransformer
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.next_latent_wrapper import MSECosineSimLoss, NextLatentWrapper, RolloutGRU
from x_transformers.recirculation import Recirculation, RecirculationMixer
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper
from x_transformers.xl_autoregressive_wrapper import (
    EpisodicMemories,
    EpisodicMemoryWrapper,
    TTTMetaLearningTargetKLLoss,
    TTTNextLatentPredictionLoss,
    XLAutoregressiveWrapper,
)
from x_transformers.xm_latent_decoder import XMLatentDecoder

SIZES: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": 16, "max_seq_len": LENGTH, "heads": 2, "attn_dim_head": 8}


def deeper() -> Decoder:
    return Decoder(**{**fuzz.STACK, "depth": 2})


def of_one_scale() -> Any:
    return net(lambda: fuzz.decoder(depth_scale_residual=True), tie_embedding=True, post_emb_norm=True)


def adapting() -> Any:
    model = XLAutoregressiveWrapper(net(max_mem_len=8), tbptt_steps=2, ttt_module_paths=("to_logits",))
    model.init_ttt(2)
    return model


CONSTRUCTORS: dict[str, Build] = {
    "EpisodicMemories": (EpisodicMemories, lambda: {"depth": 1, "heads": 2, "seq_len": 3, "dim_head": 4}),
    "EpisodicMemoryWrapper": (EpisodicMemoryWrapper, lambda: {"net": net(), "episodic_mem_len": 2}),
    "TTTMetaLearningTargetKLLoss": (TTTMetaLearningTargetKLLoss, lambda: {"dim": 16, "num_classes": 4, "dim_head": 8}),
    "TTTNextLatentPredictionLoss": (TTTNextLatentPredictionLoss, lambda: {"dim": 16}),
    "DiscoverDecoder": (
        DiscoverDecoder,
        lambda: {"decoder": net(), "num_fillers": 5, "bos_id": 6, "pad_id": 7, "max_seq_len": LENGTH},
    ),
    "TPREncoder": (TPREncoder, lambda: {"dim": 16, "num_fillers": 5, "num_roles": 4}),
    "FreeTransformer": (
        FreeTransformer,
        lambda: {**SIZES, "dec_head_depth": 1, "dec_tail_depth": 1, "latent_bits": 2},
    ),
    "BinaryMapper": (BinaryMapper, lambda: {"bits": 2}),
    "FullBandwidth": (FullBandwidth, lambda: {"net": of_one_scale()}),
    "LatentAutoregressive": (LatentAutoregressive, lambda: {"net": net(), "dim": 16}),
    "GPTVAE": (GPTVAE, lambda: {**SIZES, "depth": 1, "enc_depth": 1}),
    "NextLatentWrapper": (NextLatentWrapper, lambda: {"net": net(), "dim": 16}),
    "RolloutGRU": (RolloutGRU, lambda: {"dim": 16}),
    "MSECosineSimLoss": (MSECosineSimLoss, dict),
    "Recirculation": (
        Recirculation,
        lambda: {"net": net(lambda: Decoder(**{**fuzz.STACK, "depth": 2})), "source_layer": 1, "destination_layer": 0},
    ),
    "RecirculationMixer": (RecirculationMixer, lambda: {"dim": 16}),
    "SyntheticDataGenerator": (SyntheticDataGenerator, lambda: {"dim": 8, "num_tokens": VOCABULARY}),
    "UniversalPretrainWrapper": (
        UniversalPretrainWrapper,
        lambda: {"model": net(), "batch_size": 2, "seq_len": 6, "buffer_size": 4, "num_reset": 1, "seed_length": 2},
    ),
    "XMLatentDecoder": (XMLatentDecoder, lambda: {"net": net()}),
}


def made(name: str) -> Any:
    make, arguments = CONSTRUCTORS[name]
    return make(**arguments()).eval()


PROMPT = {"filter_logits_fn", "temperature", "eos_token"}

CALLS: dict[str, Call] = {
    "DiscoverDecoder": Call(lambda: made("DiscoverDecoder").forward, lambda: {"tokens": ids(2, 4) % 5}, ("targets",)),
    "DiscoverDecoder.encode": Call(
        lambda: made("DiscoverDecoder").encode, lambda: {"tokens": ids(2, 4) % 5}, ("mask",)
    ),
    "DiscoverDecoder.decode": Call(
        lambda: made("DiscoverDecoder").decode,
        lambda: {"encodings": features(2, 16), "lengths": torch.tensor([2, 3])},
        ("eos_id", "max_len"),
    ),
    "TPREncoder": Call(
        lambda: made("TPREncoder").forward,
        lambda: {"tokens": ids(2, 4) % 5, "role_ids": ids(2, 4) % 4, "mask": torch.ones(2, 4, dtype=torch.bool)},
    ),
    "FreeTransformer": Call(
        lambda: made("FreeTransformer").forward, lambda: {"seq": ids()}, ("seq_for_latents", "return_all_losses")
    ),
    "FreeTransformer.generate": Call(
        lambda: made("FreeTransformer").generate,
        lambda: {"prompts": ids()[:, :3], "seq_len": 5},
        ("latents", "filter_logits_fn", "logit_filter_kwargs", "use_kv_cache", "temperature", "eos_token"),
    ),
    "FullBandwidth": Call(
        lambda: made("FullBandwidth").forward,
        lambda: {"token_ids": ids()},
        ("temporal_parallel_passes", "transition", "dynamic_loss_decay", "dynamic_loss_threshold", "mask"),
    ),
    "FullBandwidth.generate": Call(
        lambda: made("FullBandwidth").generate,
        lambda: {"prompts": ids()[:, :3], "seq_len": 2},
        ("temperature", "filter_logits_fn", "filter_kwargs", "should_fuse_latent", "transition", "eos_token"),
    ),
    "XLAutoregressiveWrapper.init_ttt": Call(lambda: adapting().init_ttt, lambda: {"batch": 2}),
    "XLAutoregressiveWrapper.update_ttt": Call(
        lambda: adapting().update_ttt,
        lambda: {"logits": features(2, LENGTH, VOCABULARY).requires_grad_(), "chunk_labels": ids(2, LENGTH)},
        ("intermediates",),
    ),
    "LatentAutoregressive": Call(
        lambda: made("LatentAutoregressive").forward, lambda: {"x": ids()}, ("return_loss_breakdown", "mask")
    ),
    "GPTVAE": Call(lambda: made("GPTVAE").forward, lambda: {"seq": ids()}, ("seq_for_latents", "return_all_losses")),
    "GPTVAE.generate": Call(
        lambda: made("GPTVAE").generate,
        lambda: {"prompts": ids()[:, :3], "seq_len": 2},
        ("latents", "seq_for_latents", *sorted(PROMPT)),
    ),
    "GPTVAE.encode_to_latents": Call(
        lambda: made("GPTVAE").encode_to_latents, lambda: {"seq": ids()}, ("return_mean_log_var",)
    ),
    "NextLatentWrapper": Call(
        lambda: made("NextLatentWrapper").forward, lambda: {"x": ids()}, ("return_loss_breakdown", "mask")
    ),
    "Recirculation": Call(
        lambda: made("Recirculation").forward, lambda: {"x": ids()}, ("cache", "seq_start_pos", "mask")
    ),
    "SyntheticDataGenerator.generate": Call(
        lambda: made("SyntheticDataGenerator").generate,
        lambda: {"length": 4, "seed": ids(1, 2), "temperature": 1.0},
        ("condition",),
    ),
    "XMLatentDecoder": Call(
        lambda: made("XMLatentDecoder").forward,
        lambda: {"seq": ids()},
        ("latents", "candidates", "max_batch_size", "latent_drop_prob", "repulsive_loss_weight", "mask", "winner_fn"),
    ),
    "XMLatentDecoder.generate": Call(
        lambda: made("XMLatentDecoder").generate,
        lambda: {"start_tokens": ids()[:, :3], "seq_len": 2},
        ("latents", *sorted(PROMPT)),
    ),
}


if __name__ == "__main__":
    fuzz.CONSTRUCTORS, fuzz.CALLS = CONSTRUCTORS, CALLS
    fuzz.main(sys.argv[1:])
else:
    fuzz.CONSTRUCTORS.update(CONSTRUCTORS)
    fuzz.CALLS.update(CALLS)
