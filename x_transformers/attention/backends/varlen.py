"""Variable-length kernels: the documents of a packed row, without a mask of every pair of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from packaging.version import Version
from torch import Tensor

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation
from x_transformers.attention.base import Needs

SINCE = Version("2.13")
"""First version of PyTorch whose kernel takes grouped heads, a scale and causality as here."""

WIDEST = 256
"""Largest number of features per head that the kernel takes."""


class Varlen(Backend):
    """PyTorch's variable-length FlashAttention, for documents with no other rule than causality.

    It takes one row of tokens and the boundaries of the documents in it.
    """

    name = "varlen"
    fused = True
    provides = Needs.DOCUMENTS
    reads_documents = True

    def refuses(self, situation: Situation, needs: int) -> str | None:
        if not needs & Needs.DOCUMENTS:
            return "varlen is for packed documents"
        if situation.device != "cuda":
            return f"varlen has no kernel for {situation.device}"
        if situation.dtype not in (torch.float16, torch.bfloat16):
            return f"varlen has no kernel for {situation.dtype}"
        if situation.width > WIDEST:
            return f"varlen takes heads of at most {WIDEST} features"
        if Version(Version(torch.__version__).base_version) < SINCE:
            return f"varlen needs PyTorch {SINCE}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "varlen needs an Ampere GPU or a later one"
        return None

    def attend(self, request: Request) -> AttentionOutput:
        from torch.nn.attention.varlen import varlen_attn

        visible = request.visible
        assert visible.documents is not None
        documents = visible.documents
        # the kernel needs one width for queries, keys and values, a multiple of 8
        width = -(-max(request.q.shape[-1], request.v.shape[-1]) // 8) * 8
        q, k, v = (_flat(t, width) for t in (request.q, request.k, request.v))
        out = varlen_attn(
            q,
            k,
            v,
            documents.starts_q,
            documents.starts_k,
            documents.longest_q,
            documents.longest_k,
            scale=request.scale,
            # keys to the left and right of a query, which the kernel aligns at the end of each document; -1: all
            window_size=(-1, 0) if visible.is_causal else (-1, -1),
            enable_gqa=request.k.shape[1] != request.q.shape[1],
        )
        assert isinstance(out, Tensor)
        out = rearrange(out[..., : request.v.shape[-1]], "n h d -> 1 h n d")
        fully_masked = visible.fully_masked_queries(request.memo)
        return AttentionOutput(out if fully_masked is None else out.masked_fill(fully_masked, 0.0))


def _flat(t: Tensor, width: int) -> Tensor:
    """Reshape `(1, h, n, d)` to `(n, h, width)`, with zeros for the missing features."""
    t = rearrange(t, "1 h n d -> n h d")
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))
