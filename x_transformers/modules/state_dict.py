"""State dicts in our layout and in that of x-transformers 2.31 (the reference), which models read and write.

A module whose entries have other names in the reference lists them in `reference_names`. One with a different layout
implements `translate_reference(state, prefix)`, which turns the entries below `prefix` into ours, in place, and its
inverse `export_reference`. None of our names is a name in the reference, so that translating twice changes nothing, and
a user need not say which layout a file has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from x_transformers.modules.float32_buffers import device_of, leave_meta
from x_transformers.modules.whole_loading import PLAIN_LOADERS, check_whole, load_whole
from x_transformers.options.checked import Checked


class LoadsWhole(Checked, nn.Module):
    """Base class of modules that check the arguments of their constructor, and load a state dict as a whole."""

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
        translate = _Translation()
        result = load_whole(self, state_dict, super().load_state_dict, translate, strict=strict, assign=assign)
        translate.finish()
        return result


class ReadsReference(LoadsWhole):
    """Base class of modules that load both layouts, wherever they are nested."""

    def reference_names(self) -> Mapping[str, str]:
        """Return the names of the reference's entries and ours, without prefix.

        A name that ends with a dot means all entries below it.
        """
        return {}

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        """Turn the entries of the reference into ours, in place.

        Args:
            state: a state dict, which is changed.
            prefix: of the names of this module's entries.
        """
        for theirs, ours in self.reference_names().items():
            rename_entries(state, prefix + theirs, prefix + ours)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        """Turn our entries into those of the reference, in place. The modules in this one have done so already.

        Args:
            state: a state dict, which is changed.
            prefix: of the names of this module's entries.

        Raises:
            StateDictError: if the reference has nothing like this module.
        """
        for theirs, ours in reversed(list(self.reference_names().items())):
            rename_entries(state, prefix + ours, prefix + theirs)

    def after_loading(
        self, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        """Return what to do once a state dict is loaded, if it says something about this module besides its entries.

        Args:
            state: the state dict, in either layout.
            prefix: of the names of this module's entries.
            metadata: what `state_dict` noted about this module.
        """
        return None

    def export_reference_state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the names of x-transformers 2.31, and in its order of grouped heads.

        Loaded by a model of that library with the same options (or by ours), they give the same outputs, except where
        this library corrects a fault; see the page about x-transformers in the documentation.

        Raises:
            StateDictError: if that library has nothing like a part of this model.
        """
        state = dict(self.state_dict())
        _export(self, state, "")
        return state

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
        finish = self.after_loading(state_dict, prefix, local_metadata)
        if finish is not None and not _fits(self, state_dict, prefix):
            finish = None
        self.translate_reference(state_dict, prefix)
        if local_metadata.get("assign_to_params_buffers", False):
            # what no state dict contains goes where the weights are
            leave_meta(self, device_of(state_dict, prefix))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if finish is not None:
            finish()


PLAIN_LOADERS.add(ReadsReference._load_from_state_dict)


class _Translation:
    """Translation of the entries of one module after another, and what these have to do once they are loaded."""

    def __init__(self) -> None:
        self.later: list[tuple[ReadsReference, dict[str, Any], str, Mapping[str, Any]]] = []

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
        if isinstance(module, ReadsReference):
            if module.after_loading(state, prefix, metadata) is not None:
                self.later.append((module, dict(state), prefix, metadata))
            module.translate_reference(state, prefix)

    def finish(self) -> None:
        """Do what is left to do; a module may have done it when PyTorch came to it."""
        for module, state, prefix, metadata in self.later:
            finish = module.after_loading(state, prefix, metadata)
            if finish is not None:
                finish()


def load_state(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict into any module as a whole or not at all, also into one that is not of this library.

    Raises:
        StateDictError: see `LoadsWhole.load_state_dict`.
    """
    if isinstance(module, LoadsWhole):
        module.load_state_dict(state_dict)
    else:
        translate = _Translation()
        load_whole(module, state_dict, module.load_state_dict, translate)
        translate.finish()


def check_state(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Check that a state dict fits any module, without loading it.

    Raises:
        StateDictError: see `LoadsWhole.load_state_dict`.
    """
    check_whole(module, state_dict, _Translation())


def translate(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Translate the entries of a module and of all modules in it, parents before children, in place."""
    if isinstance(module, ReadsReference):
        module.translate_reference(state, prefix)
    for name, child in module.named_children():
        translate(child, state, f"{prefix}{name}.")


def _export(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Turn the entries of all modules in a module, and then its own, into those of the reference, in place."""
    for name, child in module.named_children():
        _export(child, state, f"{prefix}{name}.")
    if isinstance(module, ReadsReference):
        module.export_reference(state, prefix)


def _fits(module: nn.Module, state: Mapping[str, Any], prefix: str) -> bool:
    """Return True if a state dict contains every entry of a module below a prefix, in the right shape."""
    translated = {name: t for name, t in state.items() if name.startswith(prefix)}
    translate(module, translated, prefix)
    return all(
        prefix + name in translated and translated[prefix + name].shape == own.shape
        for name, own in module.state_dict().items()
        if isinstance(own, Tensor)
    )


def rename_entries(state: dict[str, Any], old: str, new: str) -> None:
    """Rename one entry, if it is there; or, if the name ends with a dot, all entries below it."""
    if old.endswith("."):
        rename_prefix(state, old, new)
    else:
        rename(state, old, new)


def rename(state: dict[str, Any], old: str, new: str) -> None:
    """Rename one entry, if it is there."""
    if old in state:
        state[new] = state.pop(old)


def rename_prefix(state: dict[str, Any], old: str, new: str) -> None:
    """Replace the prefix `old` of names by `new`."""
    for key in [key for key in state if key.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)
