"""Segmentation of sequences into longer tokens, by the entropy of a small model (2412.09871)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_ids
from x_transformers.models.embeddings import checked_ids
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import at_least_float32

__getattr__ = names_of(__name__)


class EntropyBasedTokenizer(LoadsWhole):
    """Tokenizer that ends a token where the entropy of the next id is high.

    Args:
        decoder: a causal model over ids, `(b, n)` to logits `(b, n, v)`.
        entropy_threshold: a token ends at a position whose entropy, in nats, is at least this.
        accumulate_entropy: compare the sum of entropies since the last end instead.
        ignore_entropy_below: entropies below this add nothing to the sum; at most the threshold.
        max_token_size: greatest length of a token.

    Raises:
        ConfigError: if an option is out of range or without effect.
    """

    def __init__(
        self,
        decoder: nn.Module,
        entropy_threshold: float,
        accumulate_entropy: bool = False,
        ignore_entropy_below: float = 0.0,
        max_token_size: int | None = None,
    ) -> None:
        super().__init__()
        if ignore_entropy_below > entropy_threshold:
            raise ConfigError(
                f"`ignore_entropy_below` is {ignore_entropy_below}; it must not exceed `entropy_threshold` "
                f"{entropy_threshold}, or no sum would count what ends a token."
            )
        if ignore_entropy_below and not accumulate_entropy:
            raise ConfigError("`ignore_entropy_below` applies to sums; set `accumulate_entropy = True`, or drop it.")
        if max_token_size is not None and max_token_size < 1:
            raise ConfigError(f"`max_token_size` is {max_token_size}; a token has at least 1 position.")
        self.decoder = decoder
        self.entropy_threshold, self.accumulate_entropy = entropy_threshold, accumulate_entropy
        self.ignore_entropy_below, self.max_token_size = ignore_entropy_below, max_token_size

    @torch.no_grad()
    @checked
    def forward(
        self,
        seq: Ids,
        lens: Tensor | None = None,
        return_segmented_seq: bool = False,
        decoder_forward_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the lengths of tokens, or the tokens; the last valid position always ends one.

        Args:
            seq: `(b, n)` ids, or `(n,)`. Ids after the length of a row are not read.
            lens: `(b,)` number of valid ids of each row; for `(n,)` ids a single number.
            return_segmented_seq: return the ids of each token instead of their number.
            decoder_forward_kwargs: keywords of the model's pass.

        Returns:
            `(b, t)` lengths, filled with 0 on the right; or for each row a tuple of `(length,)` ids. For `(n,)` ids
            the lengths `(t,)`, or one tuple.

        Raises:
            InputError: with what was given and what is needed.
        """
        # imported here because it takes seconds, which only those who segment sequences should wait for
        import einx

        seq = as_ids(seq, self, "`seq`")
        single = seq.ndim == 1
        seq = checked_ids(seq.unsqueeze(0) if single else seq, self)
        if seq.shape[1] == 0:
            raise ShapeError(f"`seq` has shape {tuple(seq.shape)}; there is nothing to cut.")
        lens = _lengths(lens, seq)
        valid = einx.less("n, b -> b n", torch.arange(seq.shape[1], device=seq.device), lens)  # type: ignore[reportPrivateImportUsage]
        view = InferenceView(self.decoder)
        with torch.no_grad(), view:
            logits = view.of(self.decoder)(seq.long().masked_fill(~valid, 0), **(decoder_forward_kwargs or {}))
        if logits.ndim != 3:
            raise ShapeError(
                f"the decoder returns a tensor of shape {tuple(logits.shape)}; it must return logits (b, n, v). Of a "
                "training wrapper, pass its `net`."
            )
        ends = self._ends(calc_entropy_from_logits(logits), lens) & valid
        sizes = [_sizes(row) for row in ends]
        if return_segmented_seq:
            cut = [row[: size.sum()].split(size.tolist()) for row, size in zip(seq, sizes, strict=True)]
            segments = [tuple(parts) if len(size) else () for parts, size in zip(cut, sizes, strict=True)]
            return segments[0] if single else segments
        return sizes[0] if single else pad_sequence(sizes, batch_first=True)

    def _ends(self, entropies: Tensor, lens: Tensor) -> Tensor:
        """Return `(b, n)` bool, True where a token ends."""
        import einx

        if self.accumulate_entropy:
            ends = get_accumulated_threshold_mask(entropies, self.entropy_threshold, self.ignore_entropy_below)
        else:
            ends = entropies >= self.entropy_threshold
        places = torch.arange(ends.shape[1], device=ends.device)
        ends = ends | einx.equal("n, b -> b n", places, lens - 1)  # type: ignore[reportPrivateImportUsage]
        if self.max_token_size is None:
            return ends
        # The first position of the token that contains each position: one after the last end before it.
        begins = torch.where(ends, places + 1, 0).cummax(dim=-1).values.roll(1, dims=-1)
        begins[:, 0] = 0
        # long tokens are cut from their own first position on, so that rows do not influence each other's cuts
        return ends | ((places - begins + 1) % self.max_token_size == 0)


def calc_entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy `(...)` of `softmax(logits)`, in nats, for `logits (..., v)`."""
    return torch.special.entr(at_least_float32(logits).softmax(dim=-1)).sum(dim=-1)


def get_accumulated_threshold_mask(entropies: Tensor, threshold: float, ignore_entropy_below: float = 0.0) -> Tensor:
    """Return `(b, n)` bool, True where the sum of entropies since the last end reaches the threshold.

    Args:
        entropies: `(b, n)`.
        threshold: the sum that ends a token.
        ignore_entropy_below: smaller entropies add nothing.
    """
    # Each end resets the sum, so positions depend on each other. These are many small steps, fastest on the host.
    counted = entropies.masked_fill(entropies < ignore_entropy_below, 0.0).cpu()
    total = torch.zeros_like(counted[:, 0])
    ends = []
    for value in counted.unbind(dim=-1):
        total = total + value
        ends.append(total >= threshold)
        total = total.masked_fill(ends[-1], 0.0)
    return torch.stack(ends, dim=-1).to(entropies.device)


def _sizes(ends: Tensor) -> Tensor:
    """Return the lengths between the ends of one row."""
    at = ends.nonzero().flatten() + 1
    return at.diff(prepend=at.new_zeros(1))


def _lengths(lens: Tensor | None, seq: Tensor) -> Tensor:
    batch, n = seq.shape
    if lens is None:
        return torch.full((batch,), n, device=seq.device)
    lens = torch.as_tensor(lens, device=seq.device).reshape(-1)
    if lens.shape != (batch,) or lens.is_floating_point() or lens.is_complex() or lens.dtype is torch.bool:
        raise ShapeError(
            f"`lens` has shape {tuple(lens.shape)} and dtype {lens.dtype}; it must hold {batch} whole numbers."
        )
    lens = lens.long()
    if bool(((lens < 0) | (lens > n)).any()):
        raise InputError(f"`lens` holds {lens.tolist()}; the rows have {n} ids.")
    return lens
