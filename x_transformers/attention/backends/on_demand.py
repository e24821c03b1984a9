"""Scores that are computed when somebody reads them, by the explicit backend, after a pass that did without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from x_transformers.attention.backends.base import Backend, Request
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.forward_pass.intermediates import Scores
from x_transformers.masks.builder import spelled_out


def can_wait(request: Request, backend: Backend, training: bool) -> bool:
    """Return True if the scores of a request would be the same when they are computed again.

    What draws at random in training, writes to the cache while it computes, or calls a user's function has no fused
    kernel.
    """
    return backend.fused or not (training or request.rows or request.weighting is not None or request.weights)


def scores_on_demand(request: Request) -> Callable[[], Scores]:
    """Return a function that computes similarities, logits and weights of a request, with a graph if the pass had one.

    It keeps queries and keys, which have a number per token, instead of the scores.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    # weights are shown before dropout, and nothing is to be drawn
    request = request._replace(capture=True, dropout=0.0)

    def compute() -> Scores:
        own, visible = request, request.visible
        if visible.documents is not None:
            own = own._replace(visible=spelled_out(visible, own.q.shape[-2], own.k.shape[-2]))
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast(own.q.device.type, enabled=False),
        ):
            result = Explicit().attend(own)
        return result.similarities, result.logits, result.weights

    return compute
