"""Speech to text by an encoder of spectrograms and a decoder (2212.04356)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.errors import ConfigError, ShapeError, StateDictError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_counts, checked
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.kinds import CROSS_ATTENTION
from x_transformers.losses import plus_aux_loss, run_with_aux_loss
from x_transformers.models.continuous import ContinuousTransformerWrapper
from x_transformers.models.convolutional_front import ConvolutionalFront
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.schema import at_least


class SpeechTransformer(SavesFolders):
    """Encoder of spectrograms and decoder of text: spectrograms to the loss of target tokens.

    Two convolutions turn n frames into ceil(n / 2) vectors, which the encoder reads and the decoder attends to.

    Args:
        encoder: over vectors, with one output for each. Its positions count pairs of frames.
        decoder: its stack has cross-attention, to contexts of the width of the encoder's outputs.
        num_mels: number of frequencies of a frame.
        ignore_index, pad_value: of the `AutoregressiveWrapper` around the decoder.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        encoder: ContinuousTransformerWrapper,
        decoder: TransformerWrapper,
        num_mels: int = 80,
        ignore_index: int = -100,
        pad_value: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, num_mels=num_mels)
        inner = unwrapped(encoder)
        _check(inner, unwrapped(decoder))
        self.num_mels = num_mels
        self.front = ConvolutionalFront(num_mels, inner.attn_layers.dim if inner.dim_in is None else inner.dim_in)
        self.encoder = encoder
        self.decoder = AutoregressiveWrapper(decoder, ignore_index=ignore_index, pad_value=pad_value)

    @checked
    @passes_on("decoder", but=("context", "context_mask"))
    def forward(self, audio: Tensor, tgt: Ids, lens: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the mean over all valid targets of `-log p(tgt[t + 1] | tgt[..t], audio)`.

        Args:
            audio: `(b, num_mels, n)` spectrograms.
            tgt: `(b, m)` ids, the first of which is a start token.
            lens: `(b,)` numbers of valid frames, which come first; default all.
            kwargs: of the decoder's loss, see `AutoregressiveWrapper.forward`.

        Returns:
            A scalar, or what else `kwargs` request.

        Raises:
            InputError: with what was given and what is needed.
        """
        context, mask, aux = _encode(self.front, self.encoder, audio, lens)
        return plus_aux_loss(self.decoder(tgt, context=context, context_mask=mask, **kwargs), aux)

    @checked
    def encode(self, audio: Tensor, lens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the decoder attends to, and which of it is valid.

        Args:
            audio, lens: as in `forward`.

        Returns:
            `(b, ceil(n / 2), D)` features, and their mask, or None without `lens`.

        Raises:
            InputError: with what was given and what is needed.
        """
        return _encode(self.front, self.encoder, audio, lens)[:2]

    @checked
    @passes_on("decoder.generate", but=("context", "context_mask"))
    def generate(
        self, audio: Tensor, seq_out_start: Ids, seq_len: int, lens: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Continue each start by at most `seq_len` tokens, in evaluation mode.

        Args:
            audio, lens: as in `forward`.
            seq_out_start: `(b, m)` ids, or a list of `(m,)` ids of different lengths.
            seq_len: number of tokens to generate.
            kwargs: of `AutoregressiveWrapper.generate`.

        Returns:
            What `AutoregressiveWrapper.generate` returns: the new tokens, `(b, at most seq_len)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        context, mask = self._encode_for_inference(audio, lens)
        return self.decoder.generate(seq_out_start, seq_len, context=context, context_mask=mask, **kwargs)

    @checked
    @passes_on("decoder.stream", but=("context", "context_mask"))
    def stream(
        self, audio: Tensor, seq_out_start: Ids, seq_len: int, lens: Tensor | None = None, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, `(b,)` each; the decoder is in evaluation mode until the last one.

        Args:
            audio, seq_out_start, seq_len, lens: as in `generate`.
            kwargs: of `AutoregressiveWrapper.stream`.

        Raises:
            InputError: immediately, with what was given and what is needed.
        """
        context, mask = self._encode_for_inference(audio, lens)
        return self.decoder.stream(seq_out_start, seq_len, context=context, context_mask=mask, **kwargs)

    def _encode_for_inference(self, audio: Tensor, lens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        view = InferenceView(self.encoder)
        with torch.no_grad(), view:
            return _encode(self.front, view.of(self.encoder), audio, lens)[:2]

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no encoder of spectrograms; a SpeechTransformer cannot be exported.")


def _encode(
    front: ConvolutionalFront, encoder: ContinuousTransformerWrapper, audio: Tensor, lens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return features, their mask, or None without `lens`, and the auxiliary loss, if there is one."""
    channels = front.first.in_channels
    if audio.ndim != 3 or audio.shape[1] != channels or not audio.shape[-1] or not audio.is_floating_point():
        raise ShapeError(
            f"`audio` has shape {tuple(audio.shape)} and dtype {audio.dtype}; it must be floating, (batch, "
            f"{channels}, frames), with at least one frame."
        )
    if lens is None:
        features, aux = run_with_aux_loss(encoder, front(audio))
        return features, None, aux
    frames = audio.shape[-1]
    check_counts(lens, "lens", frames, audio.shape[0])
    mask = torch.arange(frames, device=audio.device) < lens.unsqueeze(-1)
    # output i reads the frames around 2 i, of which the first is never before the first one of the row
    features, aux = run_with_aux_loss(encoder, front(audio, mask), mask=mask[:, ::2])
    return features, mask[:, ::2], aux


def _check(encoder: ContinuousTransformerWrapper, decoder: TransformerWrapper) -> None:
    """Raise a `ConfigError` unless the decoder can attend to the encoder's outputs."""
    for name, model, kind in (
        ("encoder", encoder, ContinuousTransformerWrapper),
        ("decoder", decoder, TransformerWrapper),
    ):
        if not isinstance(model, kind):
            raise ConfigError(f"`{name}` is a {type(model).__name__}; it must be a {kind.__name__}.")
    if encoder.average_pool_embed or encoder.probabilistic:
        raise ConfigError(
            "the decoder attends to one output of the encoder for each pair of frames; drop its `average_pool_embed` "
            "and `probabilistic`."
        )
    if unwrapped(encoder.attn_layers).cross_attend:
        raise ConfigError("the encoder reads spectrograms only; drop `cross_attend` of its stack.")
    layers = unwrapped(decoder.attn_layers)
    if not layers.cross_attend:
        raise ConfigError("the decoder attends to the encoder's outputs; set `cross_attend = True` in its stack.")
    needed = layers.attentions(CROSS_ATTENTION.letter)[0].dim_context
    if encoder.dim_out not in (None, needed):
        raise ConfigError(
            f"the encoder's outputs have the width {encoder.dim_out}, and the decoder attends to contexts of the width "
            f"{needed}; set `cross_attn_dim_context` of its stack, or `dim_out` of the encoder."
        )
