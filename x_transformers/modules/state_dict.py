"""Loading of state dicts, in our layout or in that of x-transformers 2.31 (the reference).

A module with another layout in the reference implements `translate_reference(state, prefix)`, which renames the entries
below `prefix` in place and permutes grouped heads. None of our names is a name in the reference, so that translating
twice changes nothing, and a user need not say which layout a file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from x_transformers.modules.whole_loading import PLAIN_LOADERS, check_whole, load_whole


class LoadsWhole(nn.Module):
    """Base class of modules that load a state dict as a whole or not at all."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights in our layout or that of the reference, also of a model that `torch.compile` or DDP wrapped.

        Args:
            state_dict: the weights; not changed.
            strict: raise an error if entries are missing or unexpected.
            assign: use the tensors of `state_dict` as parameters, instead of copying their values.

        Returns:
            the missing and unexpected keys, as `torch.nn.Module.load_state_dict` does.

        Raises:
            StateDictError: if entries are missing or unexpected (only if `strict`), have other shapes or another kind
                of dtype, or are no dense tensors. The message lists all of them, and the model keeps its weights.
        """
        return load_whole(self, state_dict, super().load_state_dict, _translate, strict=strict, assign=assign)


class ReadsReference(LoadsWhole):
    """Base class of modules that load both layouts, wherever they are nested."""

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the entries of the reference to ours, in place.

        Args:
            state: a state dict, which is changed.
            prefix: of the names of this module's entries.
        """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        # PyTorch calls this for every module, parents first, also if a user's own module contains ours
        self.translate_reference(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


PLAIN_LOADERS.add(ReadsReference._load_from_state_dict)


def load_state(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict into any module as a whole or not at all, also into one that is not of this library.

    Raises:
        StateDictError: see `LoadsWhole.load_state_dict`.
    """
    if isinstance(module, LoadsWhole):
        module.load_state_dict(state_dict)
    else:
        load_whole(module, state_dict, module.load_state_dict, _translate)


def check_state(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Check that a state dict fits any module, without loading it.

    Raises:
        StateDictError: see `LoadsWhole.load_state_dict`.
    """
    check_whole(module, state_dict, _translate)


def _translate(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Translate the entries of one module, in place."""
    if isinstance(module, ReadsReference):
        module.translate_reference(state, prefix)


def rename(state: dict[str, Any], old: str, new: str) -> None:
    """Rename one entry, if it is there."""
    if old in state:
        state[new] = state.pop(old)


def rename_prefix(state: dict[str, Any], old: str, new: str) -> None:
    """Replace the prefix `old` of names by `new`."""
    for key in [key for key in state if key.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)
