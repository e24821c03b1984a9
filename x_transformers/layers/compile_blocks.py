"""Compilation block by block: sublayers of one build share a graph, so that a deep stack compiles as one block does."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from x_transformers.forward_pass.call import Call, LayerCall
from x_transformers.forward_pass.memo import Memo
from x_transformers.layers.branch import Branch, SublayerOutput

GRAPHS = 64
"""Limit of graphs: for each build of a sublayer, in training and in evaluation, for one length and for any."""


class CompiledBlocks:
    """Runs sublayers by compiled graphs.

    Args:
        options: options of `torch.compile`.
    """

    def __init__(self, **options: Any) -> None:
        # graphs are kept, and their number is limited, per code object; the graphs of other stacks belong to copies
        own = FunctionType(_run.__code__.replace(), _run.__globals__, "run_block")
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": GRAPHS, **options}
        self.run = torch.compile(own, **options)
        # PyTorch asks whether the stream, an input of a graph, is a leaf that collects gradients; it is not
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")

    @staticmethod
    def call(call: Call) -> Call:
        """Return the pass as the graph of a single block may see it, without the results of other blocks."""
        return replace(call, memo=Memo(forgets=True))

    def __call__(self, branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
        return self.run(branch, x, layer)


def _run(branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
    return branch(x, layer)
