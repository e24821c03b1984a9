"""Modules that run a model in a way of their own, and can be used where the model can."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModelDelegate(nn.Module):
    """A module with a model as `net`; what it does not define itself is that of the model.

    A subclass defines `forward` as `TransformerWrapper.forward`, at least with what generation passes: ids, `cache`,
    `input_not_include_cache`, `return_intermediates`, `seq_start_pos`, `capture` and `logits_to_keep`.
    """

    def __getattr__(self, name: str) -> Any:
        # called only if nothing else has the name: parameters and submodules come first
        try:
            return super().__getattr__(name)
        except AttributeError:
            # a copy that is being made has no model yet
            net = self.__dict__.get("net") or self.__dict__.get("_modules", {}).get("net")
            if net is None or name.startswith("__"):
                raise
            return getattr(net, name)
