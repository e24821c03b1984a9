"""Compilation block by block: sublayers of one build share a graph, so that a deep stack compiles as one block does."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from x_transformers.forward_pass.call import Call, LayerCall, Memo
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.layers.branch import Branch, SublayerOutput

GRAPHS = 64
"""Limit of graphs of sublayers of one build: in training and in evaluation, for one length and for any.

PyTorch 2.11 and earlier versions have one limit for all functions, which is 8.
"""


class CompiledBlocks:
    """Runs sublayers by compiled graphs.

    Args:
        options: options of `torch.compile`.
    """

    def __init__(self, **options: Any) -> None:
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": GRAPHS, **options}
        self.options = options
        self.builds: dict[str, Callable[..., SublayerOutput]] = {}
        self.branches: dict[Branch, Callable[..., SublayerOutput]] = {}
        # PyTorch asks whether the stream, an input of a graph, is a leaf that collects gradients; it is not
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")

    @staticmethod
    def call(call: Call) -> Call:
        """Return the pass as the graph of a single block may see it, without the results of other blocks."""
        return replace(call, memo=Memo(forgets=True))

    def __call__(self, branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
        run = self.branches.get(branch)
        if run is None:
            run = self.branches[branch] = self._of_build(branch)
        return run(branch, x, layer)

    def _of_build(self, branch: Branch) -> Callable[..., SublayerOutput]:
        """Return the compiled function of all sublayers that were built like this one."""
        build = f"{branch.kind.letter} {vars(branch.fn).get('_config')}"
        if build not in self.builds:
            # graphs are kept, and their number is limited, per code object
            own = FunctionType(_run.__code__.replace(), _run.__globals__, "run_block")
            self.builds[build] = torch.compile(own, **self.options)
        return self.builds[build]


def _run(branch: Branch, x: Tensor, layer: LayerCall) -> SublayerOutput:
    return branch(x, layer)
