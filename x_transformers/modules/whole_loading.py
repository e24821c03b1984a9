"""Loading of a state dict as a whole or not at all: everything is checked before anything is copied.

PyTorch copies module by module; an error in the middle would leave a model with some weights of each kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.unwrap import COMPILED, plain_name, unwrapped

PLAIN_LOADERS: set[Any] = {nn.Module._load_from_state_dict, KeepsFloat32._load_from_state_dict}
"""Implementations of `_load_from_state_dict` that do no more than copy the entries of a module."""
PLAIN_TENSORS = (Tensor, nn.Parameter)
WRAPPED = ("module", "net", "model")
"""Names that DistributedDataParallel, wrappers of this library and those of others give to the model in them."""

Translate = Callable[[nn.Module, dict[str, Any], str, Mapping[str, Any]], None]


def load_whole(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    load: Callable[..., Any],
    translate: Translate,
    *,
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Load a state dict after checking all of it.

    Args:
        module: any module.
        state_dict: the weights; not changed.
        load: `torch.nn.Module.load_state_dict` of the module.
        translate: function that renames the entries of one module, given the state, the prefix of its names, and what
            `state_dict` noted about it.
        strict: raise an error if entries are missing or unexpected.
        assign: use the tensors of `state_dict` as parameters, instead of copying their values.

    Returns:
        The result of `load`.

    Raises:
        StateDictError: if the state dict does not fit; the module is unchanged.
    """
    state, metadata, check = check_whole(module, state_dict, translate, strict=strict, assign=assign)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    with ExitStack() as pending:
        for hooked in check.hooked:
            pending.enter_context(_without_pre_hooks(hooked))
        restore = _snapshot(module, assign) if check.may_fail_late else None
        try:
            return load(state, strict=strict, assign=assign)
        except Exception as error:
            if restore is not None:
                restore()
            raise StateDictError(f"This state dict does not fit {type(module).__name__}: {error}") from error


def check_whole(
    module: nn.Module, state_dict: Mapping[str, Any], translate: Translate, *, strict: bool = True, assign: bool = False
) -> tuple[OrderedDict[str, Any], dict[str, Any] | None, _Check]:
    """Return the state dict that is to be loaded, its versions and what was found out; see `load_whole`.

    Raises:
        StateDictError: if the state dict does not fit.
    """
    if not isinstance(state_dict, Mapping):
        raise StateDictError(f"a state dict maps names to tensors; {type(state_dict).__name__} was given.")
    nested = [repr(key) for key, value in state_dict.items() if _is_state(value)]
    if nested and not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise StateDictError(
            f"this is a checkpoint, which has state dicts under {_list_keys(nested)}; load the one of the model."
        )
    odd = [repr(key) for key in state_dict if not isinstance(key, str)]
    if odd:
        raise StateDictError(f"a state dict maps names to tensors, and names are strings; {_list_keys(odd)} is none.")
    state, metadata = _unwrap(module, state_dict)
    check = _Check(strict)
    check.prepare(module, state, "", metadata, translate, assign)
    own = check.own_entries(module, "")
    for key, tensor in own.items():
        if key in state:
            check.compare(key, state[key], tensor)
        else:
            check.missing.append(key)
    check.unexpected += [key for key in state if key not in own and not key.startswith(tuple(check.opaque))]
    check.raise_if_any(type(module).__name__, _hint(module, state))
    return state, metadata, check


class _Check:
    """Faults of a state dict, found without changing a module.

    Attributes:
        opaque: prefixes of modules that read their entries in a way of their own, which is not checked in advance.
        hooked: modules whose pre-hooks have run, and must not run again.
        may_fail_late: True if code of the user's or of PyTorch may still refuse an entry while others are copied.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []
        self.misfits: dict[str, list[str]] = {"wrong shape": [], "wrong dtype": [], "no dense tensor": []}
        self.opaque: list[str] = []
        self.hooked: list[nn.Module] = []
        self.may_fail_late = False

    def prepare(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Mapping[str, Any] | None,
        translate: Translate,
        assign: bool,
    ) -> None:
        """Run the pre-hooks of all modules on the state, and translate it; parents before children, in place."""
        about = dict((metadata or {}).get(prefix[:-1], {}))
        if module._load_state_dict_pre_hooks:
            self.hooked.append(module)
            local = {key: value for key, value in state.items() if key.startswith(prefix)}
            if assign:
                about["assign_to_params_buffers"] = assign
            for key in local:
                del state[key]
            for hook in module._load_state_dict_pre_hooks.values():
                hook(local, prefix, about, self.strict, self.missing, self.unexpected, self.errors)
            state.update(local)
        translate(module, state, prefix, about)
        for name, child in module._modules.items():
            if child is not None:
                self.prepare(child, state, f"{prefix}{name}.", metadata, translate, assign)

    def own_entries(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Return the parameters and saved buffers of a module by name; those of opaque modules are left out."""
        self.may_fail_late |= bool(module._load_state_dict_post_hooks)
        if (
            type(module)._load_from_state_dict not in PLAIN_LOADERS
            or type(module).get_extra_state is not nn.Module.get_extra_state
        ):
            self.opaque.append(prefix)
            self.may_fail_late = True
            return {}
        entries = {
            prefix + name: tensor
            for kept in (module._parameters, module._buffers)
            for name, tensor in kept.items()
            if tensor is not None and name not in module._non_persistent_buffers_set
        }
        for name, child in module._modules.items():
            if child is not None:
                entries |= self.own_entries(child, f"{prefix}{name}.")
        return entries

    def compare(self, key: str, entry: Any, own: Tensor) -> None:
        """Compare an entry with the tensor that it is copied to."""
        if type(own) not in PLAIN_TENSORS:  # a sharded or quantized tensor knows by itself what can be copied to it
            self.may_fail_late = True
            if isinstance(own, (nn.UninitializedParameter, nn.UninitializedBuffer)):
                return
        if not isinstance(entry, Tensor):
            self.misfits["no dense tensor"].append(f"{key} is a {type(entry).__name__}")
        elif entry.layout != own.layout or entry.is_quantized != own.is_quantized:
            self.misfits["no dense tensor"].append(f"{key} is {_layout(entry)}, the model has {_layout(own)}")
        elif entry.is_meta and not own.is_meta:
            self.misfits["no dense tensor"].append(f"{key} is on the meta device and has no values")
        elif tuple(entry.shape) != tuple(own.shape):
            self.misfits["wrong shape"].append(f"{key} is {tuple(entry.shape)}, the model has {tuple(own.shape)}")
        elif _kind(entry.dtype) != _kind(own.dtype):
            self.misfits["wrong dtype"].append(f"{key} is {entry.dtype}, the model has {own.dtype}")

    def raise_if_any(self, name: str, hint: str) -> None:
        """Raise a `StateDictError` that lists all faults."""
        groups = dict(self.misfits)
        if self.strict:
            groups |= {"missing": self.missing, "unexpected": self.unexpected}
        faults = [f"{group}: {_list_keys(keys)}" for group, keys in groups.items() if keys] + self.errors
        if faults:
            raise StateDictError(
                f"This state dict fits {name} neither in our layout nor in that of the reference; the model is "
                f"unchanged. {hint}\n  " + "\n  ".join(faults)
            )


def _unwrap(module: nn.Module, given: Mapping[str, Any]) -> tuple[OrderedDict[str, Any], dict[str, Any] | None]:
    """Copy a state dict and its versions, with the names of the wrappers in `module` instead of those of its own."""
    metadata = getattr(given, "_metadata", None)  # what `torch.nn.Module.state_dict` attaches
    inner = {
        plain_name(f"{name}." if name else ""): f"{name}.{COMPILED}." if name else f"{COMPILED}."
        for name, part in module.named_modules(remove_duplicate=False)
        if COMPILED in part._modules
    }
    outer, missing = _outer_names(module, given), _missing_name(module, given)
    if not inner and not outer and not missing and not any(COMPILED in key for key in given):
        return OrderedDict(given), metadata

    def renamed(name: str) -> str:
        plain = missing + plain_name(name).removeprefix(outer)
        prefix = max((prefix for prefix in inner if plain.startswith(prefix)), key=len, default=None)
        return plain if prefix is None else inner[prefix] + plain[len(prefix) :]

    if metadata is not None:
        metadata = {
            renamed(f"{key}." if key else key).removesuffix(".") if key or missing else key: about
            for key, about in metadata.items()
        }
    return OrderedDict((renamed(key), value) for key, value in given.items()), metadata


def _outer_names(module: nn.Module, given: Mapping[str, Any]) -> str:
    """Return what all names begin with if the state dict is that of a wrapper around the module: `"module.net."`."""
    own, outer, names = _own_names(module), "", [plain_name(key) for key in given]
    while names:
        name = names[0].removeprefix(outer).partition(".")[0]
        if name not in WRAPPED or name in own or not all(each.startswith(f"{outer}{name}.") for each in names):
            break
        outer += f"{name}."
    return outer


def _missing_name(module: nn.Module, given: Mapping[str, Any]) -> str:
    """Return what the names lack if the state dict is that of the module in this wrapper: `"net."`."""
    module = unwrapped(module)
    parts = [name for name, part in module._modules.items() if part is not None and part.state_dict()]
    if len(parts) != 1 or parts[0] not in WRAPPED or any(True for _ in module.parameters(recurse=False)):
        return ""
    return "" if any(f".{parts[0]}." in f".{key}" for key in given) else f"{parts[0]}."


def _own_names(module: nn.Module) -> set[str]:
    module = unwrapped(module)
    return {*module._modules, *module._parameters, *module._buffers}


@contextmanager
def _without_pre_hooks(module: nn.Module) -> Iterator[None]:
    """Take away the pre-hooks of a module, which have run already."""
    hooks = module._load_state_dict_pre_hooks
    module._load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        module._load_state_dict_pre_hooks = hooks


def _snapshot(module: nn.Module, assign: bool) -> Callable[[], None]:
    """Return a function that brings back the present weights of a module."""
    kept: list[dict[str, Any]] = [each for part in module.modules() for each in (part._parameters, part._buffers)]
    tensors = [
        (own, name, tensor, None if assign or tensor is None or tensor.is_meta else tensor.detach().clone())
        for own in kept
        for name, tensor in own.items()
    ]
    # what opaque modules keep elsewhere can only be read and written through their own methods
    state = module.state_dict()
    others = OrderedDict((key, value) for key, value in state.items() if not isinstance(value, Tensor))
    others._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]

    @torch.no_grad()
    def restore() -> None:
        if others:
            nn.Module.load_state_dict(module, others, strict=False)
        for own, name, tensor, values in tensors:
            own[name] = tensor
            if values is not None:
                tensor.copy_(values)

    return restore


def _hint(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Return what to do about a state dict that does not fit."""
    first = {key.partition(".")[0] for key in state}
    name = next(iter(first), "")
    if len(first) == 1 and name not in _own_names(module):
        return f"All names begin with `{name}.`, which is no part of it; remove this prefix."
    return "Build it with the options of the model that the weights come from."


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


def _layout(tensor: Tensor) -> str:
    return "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")


def _list_keys(keys: list[str], limit: int = 12) -> str:
    more = f" ... and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
