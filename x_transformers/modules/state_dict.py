"""Loading of state dicts, in our layout or in that of x-transformers 2.31 (the reference).

A module with another layout in the reference implements `translate_reference(state, prefix)`, which renames the entries
below `prefix` in place and permutes grouped heads. None of our names is a name in the reference, so that translating
twice changes nothing, and a user need not say which layout a file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.modules.float32_buffers import device_of, leave_meta


class ReadsReference(nn.Module):
    """Base class of modules that load both layouts, wherever they are nested, and a file as a whole or not at all."""

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
        if local_metadata.get("assign_to_params_buffers", False):
            # what no state dict contains goes where the weights are
            leave_meta(self, device_of(state_dict, prefix))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights in our layout or that of the reference.

        Args:
            state_dict: the weights; not changed.
            strict: raise an error if entries are missing or unexpected.
            assign: use the tensors of `state_dict` as parameters, instead of copying their values.

        Returns:
            the missing and unexpected keys, as `torch.nn.Module.load_state_dict` does.

        Raises:
            StateDictError: if entries are missing or unexpected (only if `strict`) or have other shapes. The message
                lists all of them, and the model keeps its weights.
        """
        # Everything is checked before anything is loaded: PyTorch copies module by module, and an error in the middle
        # would leave a model with some weights of each kind.
        translated = dict(state_dict)
        translate(self, translated, "")
        ours = self.state_dict()
        missing = [key for key in ours if key not in translated]
        unexpected = [key for key in translated if key not in ours]
        misshaped = [
            f"{key} is {tuple(translated[key].shape)}, the model has {tuple(ours[key].shape)}"
            for key in ours
            if key in translated
            and isinstance(ours[key], Tensor)
            and tuple(translated[key].shape) != tuple(ours[key].shape)
        ]
        groups = [("wrong shape", misshaped)]
        if strict:
            groups += [("missing", missing), ("unexpected", unexpected)]
        faults = [f"{name}: {_list_keys(keys)}" for name, keys in groups if keys]
        if faults:
            raise StateDictError(
                f"This state dict fits {type(self).__name__} neither in our layout nor in that of the reference; the "
                "model is unchanged. Build it with the options of the model that the weights come from.\n  "
                + "\n  ".join(faults)
            )
        return super().load_state_dict(translated, strict=strict, assign=assign)


def translate(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Translate the entries of a module and of all modules in it, parents before children, in place."""
    if isinstance(module, ReadsReference):
        module.translate_reference(state, prefix)
    for name, child in module.named_children():
        translate(child, state, f"{prefix}{name}.")


def rename(state: dict[str, Any], old: str, new: str) -> None:
    """Rename one entry, if it is there."""
    if old in state:
        state[new] = state.pop(old)


def rename_prefix(state: dict[str, Any], old: str, new: str) -> None:
    """Replace the prefix `old` of names by `new`."""
    for key in [key for key in state if key.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)


def _list_keys(keys: list[str], limit: int = 12) -> str:
    more = f" ... and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
