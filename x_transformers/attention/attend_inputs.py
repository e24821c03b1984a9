"""From the arguments of one call of `Attend` to the call of a sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.validation import bind_attn_bias, check_mask, check_pairs
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import kinds_of, read_mask
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Memo, Span, check_attributes
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of, refuse_beside

PACKS = "flash_pack_seq_kwargs"


@dataclass(frozen=True, eq=False)
class AttendInputs:
    """Arguments of one call of `Attend`; see `Attend.forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    attn_bias: Tensor | None
    row_mask: Tensor | None
    packs: Mapping[str, Any] | None
    causal: bool | None

    def check_shapes(self, heads: int | None) -> None:
        """Check that queries, keys and values fit each other, and the number of heads if there is one.

        Raises:
            ShapeError: if they do not.
        """
        check_attributes(self, KINDS)
        q, k, v = self.q, self.k, self.v
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        if any(t.is_complex() for t in (q, k, v)):
            raise InputError("queries, keys and values must be real; got complex numbers.")
        if not q.ndim == k.ndim == v.ndim == 4:
            raise ShapeError(f"got {shapes}; they must be (b, h, i, d), (b, g, j, d) and (b, g, j, e).")
        fits = q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
        if not fits or q.shape[1] % max(k.shape[1], 1):
            raise ShapeError(
                f"got {shapes}; batches, keys and values must agree, queries and keys have one width, and the heads of "
                "queries be a multiple of those of keys."
            )
        if heads not in (None, q.shape[1]):
            raise ShapeError(f"q has shape {tuple(q.shape)}; this was built for `heads` = {heads}.")

    def documents(self, *, packed: bool, counting: str | None) -> Documents | None:
        """Return the documents of a packed row; None if rows are not packed.

        Args:
            packed: the option is on.
            counting: the keyword of a part that needs queries and keys to be the same tokens, or None.

        Raises:
            InputError: if documents are missing, or are given where they must not be. ShapeError: if they do not fit.
        """
        check_packing(self.packs, packed=packed, cached=False, name=PACKS, keyword="flash_pack_seq")
        if self.packs is None:
            return None
        queries, keys = self.q.shape[2], self.k.shape[2]
        if counting is not None and queries != keys:
            raise InputError(
                f"there are {queries} queries and {keys} keys; {counting} reads in packed rows which key is a query's "
                "own, so that both must be the same tokens."
            )
        documents = documents_of(
            self.packs,
            batch=self.q.shape[0],
            queries=queries,
            keys=keys if counting is None else None,
            name=PACKS,
        )
        refuse_beside(PACKS, mask=self.mask, row_mask=self.row_mask)
        return documents

    def layer_call(self, causal: bool, documents: Documents | None, capture: Capture) -> LayerCall:
        """Return the call of a sublayer whose keys end with the queries; in packed rows, document by document.

        Raises:
            InputError: if there are more queries than keys in a causal call.
            ShapeError: if a mask or the bias does not fit.
        """
        (batch, heads, i, _), j, device = self.q.shape, self.k.shape[2], self.q.device
        if causal and documents is None and i > j:
            raise InputError(
                f"there are {i} queries and {j} keys; in causal attention the last query is the last key, so that the "
                "first ones would see nothing. Give as many keys, or `causal = False`."
            )
        token_mask = own = pairs = None
        if self.mask is not None and self.mask.ndim == 2:
            token_mask = check_mask(self.mask, batch, j, "mask")
        elif self.mask is not None:
            pairs = check_pairs(read_mask(self.mask, "mask"), "mask", batch=batch, heads=heads, queries=i, keys=j)
        if self.row_mask is not None:
            own = check_mask(self.row_mask, batch, i, "row_mask")
        biases = ()
        if self.attn_bias is not None:
            bias = check_pairs(self.attn_bias, "attn_bias", batch=batch, heads=heads, queries=i, keys=j)
            biases = (bind_attn_bias(bias, i, j),)
        places = torch.arange(j, device=device)
        slots = places[None] if documents is None or i != j else documents.places(j)
        query = Span(torch.arange(j - i, j, device=device), slots[:, j - i :], slots[:, j - i :], own)
        keys = Span(places, slots, slots, token_mask)
        call = Call(query, query, causal, aligned=i == j, newest=i == 1, attn_mask=pairs, capture=capture, memo=Memo())
        return LayerCall(call, keys, keys, biases=biases, carry=Carry(), deltas=Deltas(), documents=documents)


KINDS = kinds_of(AttendInputs)
