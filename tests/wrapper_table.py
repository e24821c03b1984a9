"""Every wrapper as a tiny example: how to build it, what it reads, and what is known about its loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from catalog import perturb
from torch import Tensor

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NeoMLP,
    NonAutoregressiveWrapper,
    SpeechTransformer,
    TransformerWrapper,
    ViTransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder
from x_transformers.discover_wrapper import DiscoverDecoder
from x_transformers.free_transformer import FreeTransformer
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.next_latent_wrapper import NextLatentWrapper
from x_transformers.recirculation import Recirculation
from x_transformers.xm_latent_decoder import XMLatentDecoder

VOCAB, LONGEST, WIDTH, N = 12, 16, 5, 8
STACK = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False}
HALVES = {"dim": 16, "heads": 2, "attn_dim_head": 8, "verbose": False}
MORE: dict[str, Any] = {}
"""Further keywords of every stack, for tests that fill it."""
NUMERIC = 3


def tokens(rotary: bool = True, **options: Any) -> TransformerWrapper:
    layers = Decoder(**STACK, rotary_pos_emb=rotary)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=LONGEST, attn_layers=layers, **options)


def scaled_tokens() -> TransformerWrapper:
    """A model whose states and embeddings have one scale, as feedback needs it."""
    layers = Decoder(**STACK, rotary_pos_emb=True, depth_scale_residual=True)
    return TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=LONGEST, attn_layers=layers, tie_embedding=True, post_emb_norm=True
    )


def xval() -> XValTransformerWrapper:
    layers = Decoder(**STACK, rotary_pos_emb=True)
    return XValTransformerWrapper(num_tokens=VOCAB, max_seq_len=LONGEST, numerical_token_id=NUMERIC, attn_layers=layers)


def continuous() -> ContinuousTransformerWrapper:
    layers = Decoder(**STACK)
    return ContinuousTransformerWrapper(dim_in=WIDTH, dim_out=WIDTH, max_seq_len=LONGEST, attn_layers=layers)


def half(name: str) -> dict[str, Any]:
    options = {"num_tokens": VOCAB, "max_seq_len": LONGEST, "depth": 1, "heads": 2, "attn_dim_head": 8, **MORE}
    return {f"{name}_{key}": value for key, value in options.items()}


def ids(batch: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


def pairs_of_numbers(batch: int) -> tuple[Tensor, Tensor]:
    x = ids(batch)
    x[:, ::3] = NUMERIC
    return x, torch.randn(batch, N)


def mean_cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, : x.shape[1] - 1].flatten(0, 1), x[:, 1:].flatten())


def xval_loss(model: Any, x: Tensor, numbers: Tensor) -> Tensor:
    logits, predicted = model.net(x, numbers)
    squares = (predicted[:, :-1] - numbers[:, 1:]).square() * (x[:, 1:] == NUMERIC)
    return mean_cross_entropy(logits, x) + squares.mean()


def preference(model: Any, wanted: Tensor, other: Tensor, prompt_mask: Tensor) -> Tensor:
    def score(net: Any, x: Tensor) -> Tensor:
        each = net(x[:, :-1]).log_softmax(dim=-1).gather(-1, x[:, 1:, None])[..., 0]
        kept = ~prompt_mask[:, 1:]
        return (each * kept).sum(dim=-1) / kept.sum(dim=-1)

    margin = [score(net, wanted) - score(net, other) for net in (model.policy_model, model.ref_model)]
    return -F.logsigmoid(model.beta * (margin[0] - margin[1])).mean()


def reconstruction_loss(model: Any, x: Tensor) -> Tensor:
    latents = model.bottleneck(model.encoder(x))[0]
    predicted = model.decoder(x[:, :-1], prepend_embeds=model.from_latent_to_prepend_token(latents)[:, None])
    return (predicted - x).square().mean()


def encoded_loss(model: Any, src: Tensor, tgt: Tensor) -> Tensor:
    features = model.encoder(src, return_embeddings=True)
    return mean_cross_entropy(model.decoder.net(tgt, context=features), tgt)


def speech() -> SpeechTransformer:
    encoder = ContinuousTransformerWrapper(max_seq_len=N, attn_layers=Encoder(**STACK))
    decoder = Decoder(**STACK, cross_attend=True)
    return SpeechTransformer(
        num_mels=WIDTH,
        encoder=encoder,
        decoder=TransformerWrapper(num_tokens=VOCAB, max_seq_len=LONGEST, attn_layers=decoder),
    )


def speech_loss(model: Any, audio: Tensor, tgt: Tensor) -> Tensor:
    return mean_cross_entropy(model.decoder.net(tgt, context=model.encoder(model.front(audio))), tgt)


@dataclass(frozen=True, eq=False)
class Kind:
    """A wrapper, and how to call it.

    Attributes:
        build: makes one.
        draw: a number of rows to the arguments of a pass.
        loss: the loss by hand, from outputs; None where it draws, which the wrapper's own tests follow.
        generate: the arguments of a pass, and keywords, to what is generated.
        bad: arguments of a pass, by position, and words of the refusal.
        idle: parts of names of parameters that the loss does not read.
        padded: arguments of a pass to those with padding after them, and keywords, for which the loss is the same.
        ragged: the rows of a batch of prompts, of different lengths, to what follows each of them.
        parts: the total of a loss, and the sum of its parts with their weights.
        exempt: property to the reason why it cannot hold.
    """

    name: str
    build: Callable[[], Any]
    draw: Callable[[int], tuple[Any, ...]]
    loss: Callable[..., Tensor] | None = None
    generate: Callable[..., Tensor] | None = None
    bad: tuple[tuple[Callable[[], tuple[Any, ...]], dict[str, Any], str], ...] = ()
    idle: tuple[str, ...] = ()
    padded: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    ragged: Callable[[Any, list[tuple[Any, ...]]], Tensor] | None = None
    parts: Callable[..., tuple[Tensor, Tensor]] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def ready(self) -> Any:
        """A perturbed one in evaluation mode."""
        return perturb(self.build()).eval()


EXTRA = 3
"""Columns of padding."""


def ignored(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append labels that do not count."""
    return (F.pad(x, (0, EXTRA), value=-100),), {}


def minus_one(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append the default padding id of models that have one outside of the vocabulary."""
    return (F.pad(x, (0, EXTRA), value=-1),), {}


def by_lens(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append what `lens` leaves out."""
    more = torch.ones_like(x[:, :EXTRA])
    return (torch.cat((x, more), dim=1),), {"lens": torch.full((len(x),), x.shape[1])}


def encoded_padded(src: Tensor, tgt: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.arange(src.shape[1] + EXTRA).expand(len(src), -1) < src.shape[1]
    return (F.pad(src, (0, EXTRA), value=1), F.pad(tgt, (0, EXTRA), value=-100)), {"mask": mask}


def speech_padded(audio: Tensor, tgt: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lens = torch.full((len(audio),), audio.shape[-1])
    return (F.pad(audio, (0, EXTRA), value=1.0), F.pad(tgt, (0, EXTRA), value=-100)), {"lens": lens}


def numbers_padded(x: Tensor, numbers: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.arange(x.shape[1] + EXTRA).expand(len(x), -1) < x.shape[1]
    return (F.pad(x, (0, EXTRA), value=NUMERIC), F.pad(numbers, (0, EXTRA), value=9.0)), {"mask": mask}


def preference_padded(wanted: Tensor, other: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    n = wanted.shape[1]
    prompt, valid = ((torch.arange(n + EXTRA) < most).expand(len(wanted), -1) for most in (3, n))
    masks = {"prompt_mask": prompt, "preferred_seq_mask": valid, "unpreferred_seq_mask": valid}
    return (F.pad(wanted, (0, EXTRA), value=1), F.pad(other, (0, EXTRA), value=2)), masks


def ragged_ids(**options: Any) -> Callable[[Any, list[tuple[Any, ...]]], Tensor]:
    """Give prompts of different lengths as a list."""
    return lambda model, rows: model.generate([x[0] for (x,) in rows], 5, **options)


def ragged_vectors(model: Any, rows: list[tuple[Any, ...]]) -> Tensor:
    longest = max(x.shape[1] for (x,) in rows)
    padded = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1]), value=9.0) for (x,) in rows])
    return model.generate(padded, 5, prompt_lens=torch.tensor([x.shape[1] for (x,) in rows]))


def ragged_numbers(model: Any, rows: list[tuple[Any, ...]]) -> Tensor:
    longest = max(x.shape[1] for x, _ in rows)
    x, numbers = (
        torch.cat([F.pad(each[part], (0, longest - each[part].shape[1])) for each in rows]) for part in (0, 1)
    )
    lens = torch.tensor([each[0].shape[1] for each in rows])
    return model.generate(x, numbers, 5, prompt_lens=lens, temperature=0.0).sampled_token_ids


def ragged_targets(model: Any, rows: list[tuple[Any, ...]]) -> Tensor:
    src = torch.cat([src[:, :3] for src, _ in rows])
    return model.generate(src, [tgt[0] for _, tgt in rows], 5, temperature=0.0)


def ragged_texts(model: Any, rows: list[tuple[Any, ...]]) -> Tensor:
    audio = torch.cat([audio for audio, _ in rows])
    return model.generate(audio, [tgt[0] for _, tgt in rows], 5, temperature=0.0)


def weighted(*weights: str | float) -> Callable[..., tuple[Tensor, Tensor]]:
    """Sum the parts of a loss with weights, which are numbers or attributes of the wrapper."""

    def parts(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        total, each = model(x, return_loss_breakdown=True)
        factors = [getattr(model, weight) if isinstance(weight, str) else weight for weight in weights]
        return total, sum((part * factor for part, factor in zip(each, factors, strict=True)), torch.zeros(()))

    return parts


def two_losses(weight: str | None) -> Callable[..., tuple[Tensor, Tensor]]:
    def parts(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        total, (one, other) = model(x, return_all_losses=True)
        return total, one + other * (1.0 if weight is None else getattr(model, weight))

    return parts


def numbers_parts(model: Any, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    total, parts = model(x, numbers, return_loss_breakdown=True)
    return total, parts.cross_entropy_loss.mean() + model.numerical_loss_weight * parts.numerical_mse_loss.mean()


def feedback_parts(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total, parts = model(x, return_loss_breakdown=True)
    later = torch.stack(parts.feedback_pass_losses).mean()
    return total, parts.first_pass_loss + model.feedback_pass_weight * later


def only(*values: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: values


ZEROS = torch.zeros(2, N, dtype=torch.long)
WRONG_IDS = (
    (only(ZEROS + VOCAB), {}, r"ids .*run from \d+ to 12"),
    (only(ZEROS - 1), {}, "ids .*run from -1 to"),
    (only(ZEROS + 0.5), {}, "dtype torch.float32"),
    (only(ZEROS > 0), {}, "dtype torch.bool"),
    (only(ZEROS[0]), {}, r"shapes? \(8,\)"),
    (only(ZEROS[..., None]), {}, r"shapes? \(2, 8, 1\)"),
)
TOO_LONG = (only(ZEROS[:, :1].expand(-1, LONGEST + 1)), {}, "17 tokens were given.*`max_seq_len` = 16")
NOTHING = (only(ZEROS[:, :0]), {}, r"shape \(2, 0\), in which there is nothing to predict")
MASK = torch.ones(2, N - 3, dtype=torch.bool)
SOUND = torch.zeros(2, WIDTH, 11)
VECTORS, FRAMES = torch.zeros(2, N, WIDTH), torch.zeros(2, N, WIDTH + 1)

KINDS = (
    Kind(
        "autoregressive",
        lambda: AutoregressiveWrapper(tokens(rotary=False)),
        lambda batch: (ids(batch),),
        lambda model, x: mean_cross_entropy(model.net(x), x),
        lambda model, x, **options: model.generate(x, 6, **options),
        (*WRONG_IDS, TOO_LONG, NOTHING, (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)")),
        padded=ignored,
        ragged=ragged_ids(temperature=0.0),
    ),
    Kind(
        "looped",
        lambda: AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=VOCAB,
                max_seq_len=LONGEST,
                looped=True,
                max_looped_steps=3,
                attn_layers=Decoder(**STACK, rotary_pos_emb=True, pre_and_post_norm=True),
            )
        ),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, NOTHING, (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)")),
        padded=ignored,
        ragged=ragged_ids(temperature=0.0),
    ),
    Kind(
        "exits",
        lambda: AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=VOCAB,
                max_seq_len=LONGEST,
                exit_layers=(1,),
                exit_norms=True,
                attn_layers=Decoder(**STACK, rotary_pos_emb=True),
            )
        ),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, NOTHING, (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)")),
        padded=ignored,
        ragged=ragged_ids(temperature=0.0),
        idle=("exit_norms",),
    ),
    Kind(
        "xl",
        lambda: XLAutoregressiveWrapper(tokens(max_mem_len=LONGEST)),
        lambda batch: (ids(batch),),
        lambda model, x: mean_cross_entropy(model.net(x[:, :-1]), x),
        lambda model, x, **options: model.generate(x, 12, **options),
        (*WRONG_IDS, NOTHING, (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)")),
        padded=ignored,
        exempt={"ragged": "segments begin at the same column in every row"},
    ),
    Kind(
        "test-time training",
        lambda: XLAutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=VOCAB, max_seq_len=3, max_mem_len=3, attn_layers=Decoder(**STACK, rotary_pos_emb=True)
            ),
            tbptt_steps=4,
            ttt_module_paths=("attn_layers.layers.1.1.ff.2", "episodic_mems"),
            ttt_lr=0.1,
            episodic_mem_len=2,
        ),
        lambda batch: (ids(batch),),
        generate=lambda model, x, **options: model.generate(x, 6, **options),
        bad=(*WRONG_IDS, NOTHING, (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)")),
        exempt={
            "padding": "segments count by their length",
            "ragged": "segments begin at the same column in every row",
            "graph": "gradients are computed inside, and a graph is differentiated only once",
        },
    ),
    Kind(
        "encoder and decoder",
        lambda: XTransformer(dim=16, enc_verbose=False, dec_verbose=False, **half("enc"), **half("dec")),
        lambda batch: (ids(batch), ids(batch)),
        encoded_loss,
        lambda model, src, tgt, **options: model.generate(src, tgt[:, :2], 6, **options),
        (
            *((lambda x=x: (x()[0], ZEROS), given, words) for x, given, words in (*WRONG_IDS, TOO_LONG)),
            *((lambda x=x: (ZEROS, x()[0]), given, words) for x, given, words in (*WRONG_IDS, TOO_LONG, NOTHING)),
            (only(ZEROS, ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
            (only(ZEROS[[0, 0, 1]], ZEROS), {}, r"`context` has shape \(3, 8, 16\)"),
        ),
        padded=encoded_padded,
        ragged=ragged_targets,
    ),
    Kind(
        "speech",
        speech,
        lambda batch: (torch.randn(batch, WIDTH, 11), ids(batch)),
        speech_loss,
        lambda model, audio, tgt, **options: model.generate(audio, tgt[:, :2], 6, **options),
        (
            *((lambda x=x: (SOUND, x()[0]), given, words) for x, given, words in (*WRONG_IDS, TOO_LONG, NOTHING)),
            (only(SOUND.mT, ZEROS), {}, r"`audio` has shape \(2, 11, 5\)"),
            (only(SOUND, ZEROS), {"lens": torch.ones(3).long()}, r"`lens` has shape \(3,\)"),
        ),
        padded=speech_padded,
        ragged=ragged_texts,
    ),
    Kind(
        "continuous",
        lambda: ContinuousAutoregressiveWrapper(continuous()),
        lambda batch: (torch.randn(batch, N, WIDTH),),
        lambda model, x: (model.net(x[:, :-1]) - x[:, 1:]).square().mean(),
        lambda model, x, **options: model.generate(x, 6, **options),
        (
            (only(VECTORS.long()), {}, "dtype torch.int64"),
            (only(VECTORS[0]), {}, r"shape \(8, 5\)"),
            (only(FRAMES), {}, r"shape \(2, \d, 6\)"),
            (only(VECTORS[:, :0]), {}, r"shape \(2, 0, 5\)"),
            (only(VECTORS[:, :1].expand(-1, LONGEST + 2, -1)), {}, "17 tokens were given.*`max_seq_len` = 16"),
            (only(VECTORS), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
            (only(VECTORS), {"lens": torch.ones(3).long()}, r"`lens` has shape \(3,\)"),
        ),
        padded=by_lens,
        ragged=ragged_vectors,
    ),
    Kind(
        "autoencoder",
        lambda: ContinuousTransformerAutoencoder(
            dim=16,
            dim_input=WIDTH,
            dim_latent=3,
            enc_depth=1,
            dec_depth=1,
            max_seq_len=LONGEST,
            heads=2,
            attn_dim_head=8,
            **MORE,
        ),
        lambda batch: (torch.randn(batch, N, WIDTH),),
        reconstruction_loss,
        bad=(
            (only(VECTORS.long()), {}, "dtype torch.int64"),
            (only(VECTORS[0]), {}, r"shape \(8, 5\)"),
            (only(FRAMES), {}, r"shape \(2, \d, 6\)"),
            (only(VECTORS[:, :0]), {}, r"shape \(2, 0, 5\)"),
            (only(VECTORS[:, :1].expand(-1, LONGEST + 2, -1)), {}, "18 tokens were given.*`max_seq_len` = 16"),
            (only(VECTORS), {"lens": torch.ones(3).long()}, r"`lens` has shape \(3,\)"),
        ),
        padded=by_lens,
        parts=two_losses(None),
    ),
    Kind(
        "xval",
        lambda: XValAutoregressiveWrapper(xval()),
        pairs_of_numbers,
        xval_loss,
        lambda model, x, numbers, **options: model.generate(x, numbers, 6, **options).sampled_token_ids,
        (
            *((lambda x=x: (x()[0], torch.zeros(x()[0].shape)), given, words) for x, given, words in WRONG_IDS),
            (only(ZEROS, torch.zeros(2, 3)), {}, r"`x_num` \(2, 3\); they must be equal"),
            (only(ZEROS[:, :0], torch.zeros(2, 0)), {}, "with at least one token"),
            (only(ZEROS, ZEROS.float()), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
        ),
        padded=numbers_padded,
        ragged=ragged_numbers,
        parts=numbers_parts,
    ),
    Kind(
        "multi_input",
        lambda: MultiInputTransformerWrapper(
            num_tokens={"note": VOCAB, "pitch": 4},
            max_seq_len=LONGEST,
            attn_layers=Decoder(**STACK),
            return_only_embed=True,
        ),
        lambda batch: ({"note": ids(batch), "pitch": ids(batch) % 4},),
        bad=(
            *((lambda x=x: ({"note": x()[0], "pitch": ZEROS},), given, words) for x, given, words in WRONG_IDS[:4]),
            (only({"note": ZEROS}), {}, "pitch"),
            (only({"note": ZEROS, "pitch": ZEROS[:, 1:]}), {}, r"shape"),
            (only({"note": ZEROS, "pitch": ZEROS}), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
        ),
        exempt={"padding": "a model, whose outputs are those of its tokens"},
    ),
    Kind(
        "vision",
        lambda: ViTransformerWrapper(image_size=8, patch_size=4, num_classes=3, attn_layers=Encoder(**STACK)),
        lambda batch: (torch.randn(batch, 3, 8, 8),),
        bad=(
            (only(torch.zeros(2, 3, 12, 12)), {}, "12"),
            (only(torch.zeros(2, 3, 6, 8)), {}, "6"),
            (only(torch.zeros(2, 1, 8, 8)), {}, r"shape \(2, 1, 8, 8\)"),
            (only(torch.zeros(3, 8, 8)), {}, r"shape \(3, 8, 8\)"),
            (only(torch.zeros(2, 3, 8, 8).long()), {}, "dtype torch.int64"),
        ),
        exempt={"padding": "images have one size"},
    ),
    Kind(
        "nonautoregressive",
        lambda: NonAutoregressiveWrapper(
            TransformerWrapper(num_tokens=VOCAB, max_seq_len=N, attn_layers=Encoder(**STACK)), mask_id=0, steps=3
        ),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, (only(ZEROS[:, 1:]), {}, "7.*8")),
        exempt={
            "padding": "sequences have one length",
            "rows": "which tokens are masked is drawn for the whole batch",
        },
    ),
    Kind(
        "dpo",
        lambda: DPO(tokens()),
        lambda batch: (ids(batch), ids(batch)),
        lambda model, a, b: preference(model, a, b, torch.arange(N).expand(len(a), -1) < 3),
        bad=(
            *((lambda x=x: (x()[0], x()[0]), {"prompt_mask": ZEROS > 0}, words) for x, _, words in WRONG_IDS),
            (only(ZEROS, ZEROS[:, 1:]), {"prompt_mask": ZEROS > 0}, "shape"),
            (only(ZEROS, ZEROS), {"prompt_mask": MASK}, "`prompt_mask` has shape"),
        ),
        padded=preference_padded,
    ),
    Kind(
        "belief state",
        lambda: BeliefStateWrapper(tokens(), tokens()),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, NOTHING, (only(ZEROS), {"lens": torch.ones(3).long()}, "`lens` has shape")),
        # heads of the two models, which are read for their features
        idle=("to_logits", "loss_weights"),
        padded=by_lens,
    ),
    Kind(
        "neo_mlp",
        lambda: NeoMLP(dim_in=WIDTH, dim_hidden=3, dim_out=2, dim_model=16, depth=1),
        lambda batch: (torch.randn(batch, WIDTH),),
        bad=(
            (only(torch.zeros(2, 1)), {}, r"shape \(2, 1\)"),
            (only(torch.zeros(2, 2, WIDTH)), {}, r"shape \(2, 2, 5\)"),
        ),
        idle=("random_fourier.0",),
        exempt={"padding": "it reads a fixed number of features"},
    ),
    Kind(
        "gpt_vae",
        lambda: GPTVAE(num_tokens=VOCAB, depth=1, enc_depth=1, max_seq_len=LONGEST, dim_latent=3, **HALVES),
        lambda batch: (ids(batch),),
        generate=lambda model, x, **options: model.generate(x, 6, latents=torch.ones(3), **options),
        bad=(
            *WRONG_IDS[:1],
            *WRONG_IDS[2:],  # -1 is padding
            NOTHING,
            (only(ZEROS, ZEROS[:1]), {}, "`seq_for_latents` has 1 rows and `seq` 2"),
            (only(ZEROS[:, :1].expand(-1, LONGEST + 2)), {}, "18 tokens were given.*`max_seq_len` = 17"),
        ),
        padded=minus_one,
        ragged=ragged_ids(temperature=0.0, latents=torch.ones(3)),
        parts=two_losses("vae_kl_loss_weight"),
    ),
    Kind(
        "free transformer",
        lambda: FreeTransformer(
            num_tokens=VOCAB,
            max_seq_len=LONGEST,
            dec_head_depth=1,
            dec_tail_depth=1,
            latent_bits=2,
            kl_loss_threshold=0.0,
            **HALVES,
        ),
        lambda batch: (ids(batch),),
        generate=lambda model, x, temperature, cache_kv=True: model.generate(
            x, N + 6, 1, temperature=temperature, use_kv_cache=cache_kv
        ),
        bad=(
            *WRONG_IDS[:1],
            *WRONG_IDS[2:],  # -1 is padding
            (only(ZEROS[:, :1]), {}, "there is nothing to predict"),
            (only(ZEROS, ZEROS[:1]), {}, "`seq_for_latents` has 1 rows and `seq` 2"),
        ),
        # what is returned begins with the prompts
        ragged=lambda model, rows: model.generate(
            [x[0] for (x,) in rows], max(x.shape[1] for (x,) in rows) + 4, 1, temperature=0.0
        )[:, -4:],
        parts=two_losses("kl_loss_weight"),
        exempt={"padding": "the codes are drawn from all tokens that are given, the last label too"},
    ),
    Kind(
        "next latent",
        lambda: NextLatentWrapper(tokens(), dim=16, num_rollouts=2, sigreg_loss_weight=0.1),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, (only(ZEROS[:, :3]), {}, r"shape \(2, 3\).*at least 4 tokens")),
        padded=ignored,
        parts=weighted(1.0, "next_latent_loss_weight", "kl_loss_weight", "sigreg_loss_weight"),
        exempt={"rows": "the regularization reads the distribution of all states"},
    ),
    Kind(
        "latent autoregressive",
        lambda: LatentAutoregressive(tokens(), dim=16, num_rollouts=2, predict_next_embed_no_action=True),
        lambda batch: (ids(batch),),
        bad=(*WRONG_IDS, (only(ZEROS[:, :2]), {}, r"shape \(2, 2\).*at least 3 tokens")),
        padded=ignored,
        exempt={"rows": "the regularization reads the distribution of all states"},
    ),
    Kind(
        "latent candidates",
        lambda: XMLatentDecoder(tokens(), num_latents=2, latent_dim=3, candidates=3),
        lambda batch: (ids(batch),),
        generate=lambda model, x, **options: model.generate(x, 6, latents=torch.ones(len(x), 2, 3), **options),
        bad=(
            *WRONG_IDS,
            (only(ZEROS[:, :1]), {}, "there is nothing to predict"),
            (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
            (only(ZEROS), {"latents": torch.zeros(2, 3, 3)}, r"`latents` has shape \(2, 3, 3\)"),
            (only(ZEROS), {"active_latent_index": 2}, "the slots are 0 to 1"),
        ),
        padded=ignored,
        ragged=lambda model, rows: model.generate(
            [x[0] for (x,) in rows], 5, latents=torch.ones(len(rows), 2, 3), temperature=0.0
        ),
    ),
    Kind(
        "full bandwidth",
        lambda: FullBandwidth(scaled_tokens(), 3, "dense", jitter_noise_delta=0.0),
        lambda batch: (ids(batch),),
        generate=lambda model, x, temperature, cache_kv=True: model.generate(x, 6, temperature),
        bad=(
            *WRONG_IDS,
            (only(ZEROS[:, :1]), {}, "there is nothing to predict"),
            (only(ZEROS[:, :0]), {}, r"shape \(2, 0\)"),
            (only(ZEROS), {"mask": MASK}, r"`mask` has shape \(2, 5\)"),
        ),
        padded=ignored,
        ragged=lambda model, rows: model.generate([x[0] for (x,) in rows], 5, 0.0),
        parts=feedback_parts,
    ),
    Kind(
        "recirculation",
        lambda: AutoregressiveWrapper(Recirculation(tokens(), 1, 0, use_learned=True)),
        lambda batch: (ids(batch),),
        lambda model, x: mean_cross_entropy(model.net(x), x),
        lambda model, x, **options: model.generate(x, 6, **options),
        (*WRONG_IDS, NOTHING),
        padded=ignored,
        ragged=ragged_ids(temperature=0.0),
    ),
    Kind(
        "tensor products",
        lambda: DiscoverDecoder(
            decoder=tokens(), num_fillers=VOCAB - 2, bos_id=VOCAB - 2, pad_id=VOCAB - 1, max_seq_len=N
        ),
        lambda batch: (ids(batch) % (VOCAB - 2), ids(batch) % (VOCAB - 2)),
        bad=(
            *((lambda x=x: (x()[0], x()[0]), {}, words) for x, _, words in WRONG_IDS),
            (only(ZEROS[:, :0]), {}, "one is empty"),
            (only(ZEROS, ZEROS[:1]), {}, "`targets` has 1 rows and `tokens` 2"),
        ),
        exempt={"padding": "it returns logits"},
    ),
    Kind(
        "entropy tokenizer",
        lambda: EntropyBasedTokenizer(tokens(), entropy_threshold=2.0),
        lambda batch: (ids(batch),),
        bad=(
            *WRONG_IDS[:4],
            (only(ZEROS[..., None]), {}, r"shapes? \(2, 8, 1\)"),
            (only(ZEROS), {"lens": torch.ones(3).long()}, "`lens`"),
        ),
        exempt={"padding": "it returns lengths"},
    ),
)


def given(kind: Kind) -> dict[str, Any]:
    return {"prompt_mask": torch.arange(N).expand(2, -1) < 3} if kind.name == "dpo" else {}


def run(kind: Kind, model: Any, arguments: tuple[Any, ...]) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    return model(*arguments, **given(kind))


def scalar(out: Any) -> Tensor:
    out = out[0] if isinstance(out, tuple) else out
    return out if out.ndim == 0 else out.float().square().mean()
