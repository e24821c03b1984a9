"""Reading state dicts: ours, and those that x-transformers 2.31 wrote.

A module that the reference laid out differently implements `translate_reference(state, prefix)`, which renames
(and, where heads are grouped, permutes) the entries below `prefix` in place. Our own names are never names of
the reference, so translating twice changes nothing, and nobody has to say which layout a file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from x_transformers.errors import StateDictError


class ReadsReference(nn.Module):
    """A module that takes both layouts, wherever it is nested, and never half of a file."""

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the reference's entries below `prefix` to ours, in place."""

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
        # torch calls this for every module, parents first, also where a user nests ours in a module of his own
        self.translate_reference(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights in our layout or the reference's.

        Raises:
            StateDictError: when entries are missing, unexpected (both only if `strict`) or mis-shaped. All of
                them are listed, and the model keeps the weights it had.
        """
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
        groups = [("mis-shaped", misshaped)]
        if strict:
            groups += [("missing", missing), ("unexpected", unexpected)]
        faults = [f"{name}: {_listed(keys)}" for name, keys in groups if keys]
        if faults:
            raise StateDictError(
                f"This state dict does not fit {type(self).__name__}, in our layout or in the reference's; the model "
                "is unchanged. Build the model with the options that the weights were made with.\n  "
                + "\n  ".join(faults)
            )
        return super().load_state_dict(translated, strict=strict, assign=assign)


def translate(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Translate every entry of `state`, parents before their children."""
    if isinstance(module, ReadsReference):
        module.translate_reference(state, prefix)
    for name, child in module.named_children():
        translate(child, state, f"{prefix}{name}.")


def rename(state: dict[str, Any], old: str, new: str) -> None:
    """Move one entry, if it is there."""
    if old in state:
        state[new] = state.pop(old)


def rename_prefix(state: dict[str, Any], old: str, new: str) -> None:
    """Move every entry whose name begins with `old`."""
    for key in [key for key in state if key.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)


def _listed(keys: list[str], most: int = 12) -> str:
    more = f" ... and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
