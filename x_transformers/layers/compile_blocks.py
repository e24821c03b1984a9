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
"""Kinds of sublayers, in training and in evaluation, for lengths that are fixed and for those that change."""


class Regional:
    """Runs sublayers by compiled graphs.

    Args:
        options: of `torch.compile`.
    """

    def __init__(self, **options: Any) -> None:
        # graphs are kept, and their number is limited, for each code object; those of other stacks belong to copies
        own = FunctionType(_run.__code__.replace(), _run.__globals__, "run_block")
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": GRAPHS, **options}
        self.run = torch.compile(own, **options)
        # PyTorch looks whether the stream, an input of a graph, is one that collects gradients; it is none
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")

    @staticmethod
    def call(call: Call) -> Call:
        """The pass as a graph of a single block may know it: what others made is no part of it."""
        return replace(call, memo=Memo(forgets=True))

    def __call__(self, branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
        return self.run(branch, x, layer)


def _run(branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
    return branch(x, layer)
