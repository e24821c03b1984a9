"""Ensembles of passes that each see another share of the keys (arXiv 2306.01705)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.subsampling import KeySubsampling
from x_transformers.errors import InputError
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.models.vision import ViTransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.ops import at_least_float32
from x_transformers.options.values import accepts, shown


def ensemble(model: TransformerWrapper | ViTransformerWrapper, ids: Tensor, passes: int = 8, **inputs: Any) -> Tensor:
    """Return the mean of the probabilities of several passes, each of which draws the keys that it sees.

    The model has attentions with `attn_subsample_keys`, which draw as in training; everything else is in evaluation
    mode, so that nothing else is random. `torch.manual_seed` decides about the draws.

    Args:
        model: its modes and its weights do not change.
        ids: `(b, n)` tokens, or images.
        passes: number of passes, at least 1.
        inputs: further arguments of the model's `forward`, `mask` for example.

    Returns:
        Probabilities of the shape of the logits, in float32 at least, without gradients.

    Raises:
        InputError: if nothing in the model draws keys, if a pass returns something else than logits, or if `passes` is
            no number of passes.
    """
    if not isinstance(model, (TransformerWrapper, ViTransformerWrapper)):
        raise InputError(
            f"`model` is {shown(model)}; it must be a `TransformerWrapper` or a `ViTransformerWrapper`, without what "
            "is around it."
        )
    if not accepts(int, passes) or passes < 1:
        raise InputError(f"`passes` is {passes!r}; it must be a whole number, at least 1.")
    if not any(isinstance(each, KeySubsampling) and each.part < each.whole for each in model.modules()):
        raise InputError(
            "every pass of this model sees all keys, so that all passes are equal; build it with `attn_subsample_keys`."
        )
    asked = [name for name, value in inputs.items() if name.startswith("return_") and value]
    if asked:
        raise InputError(f"an ensemble averages probabilities, which only logits have; drop `{asked[0]}`.")
    view = InferenceView(model)
    net = view.of(model)
    total: Tensor | None = None
    with torch.no_grad(), view:
        for part in net.modules():
            if isinstance(part, KeySubsampling):
                part.training = True
        for _ in range(passes):
            probabilities = at_least_float32(net(ids, **inputs)).softmax(dim=-1)
            total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / passes
