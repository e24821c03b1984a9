"""Second names of parts: those of the reference, under which scripts and adapters look for them.

A part has one place in its module, which gives it its name in state dicts and among parameters. A second name is a
property that reads and replaces what is in that place:

    class Attention(SecondNames):
        to_q = SecondName("projections.q")

`attention.to_q = other` then is `attention.projections.q = other`. PyTorch by itself would register `other` as a
further child under a name that the property hides, so that it would never run.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn


class SecondName(property):
    """Property that reads and replaces the module or the parameter in another place.

    It is None if there is nothing.

    Args:
        path: the place, as an attribute or as attributes of parts, "projections.q".
    """

    def __init__(self, path: str) -> None:
        *owners, last = path.split(".")

        def read(module: Any) -> Any:
            for name in (*owners, last):
                module = None if module is None else getattr(module, name)
            return module

        def replace(module: nn.Module, value: Any) -> None:
            setattr(module.get_submodule(".".join(owners)), last, value)

        super().__init__(read, replace, doc=f"Second name of `{path}`.")


class SecondNames(nn.Module):
    """Base class of modules with second names, or with other properties that are modules or parameters.

    An assignment reaches such a property: its setter, or an `AttributeError` if it has none.

    `named_modules` lists modules under their second names too, after the others, so that adapters which search by the
    end of a name (`to_q`) find them. `modules` therefore yields these modules twice. Names of parameters and of entries
    of state dicts are those of the places.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """Yield all modules by name, those with second names under these as well.

        Args:
            memo: the modules that were yielded already.
            prefix: of the names.
            remove_duplicate: yield each module once, apart from second names. Otherwise the paths of registered modules
                are listed, and second names are none, as `torch.export` expects.
        """
        memo = set() if memo is None else memo
        listed = self in memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        # a graph looks for parameters only, and cannot contain the cache of the names
        if not remove_duplicate or listed or torch.compiler.is_compiling():
            return
        for name in second_names(type(self)):
            module = getattr(self, name)
            if isinstance(module, nn.Module):
                yield f"{prefix}.{name}" if prefix else name, module


@functools.cache
def second_names(kind: type) -> tuple[str, ...]:
    """Return the second names that a class and its bases define."""
    return tuple(name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, SecondName))


class View(SecondNames):
    """Abstract base class of views: parts of another module, in the reference's order and under its names.

    A new view is made at each access. An assignment to a place replaces the part in the module, which uses the new one
    from then on. The places are those that the module has: none can be added or removed.
    """

    def _show(self, owner: nn.Module, places: Mapping[str, str | nn.Module]) -> None:
        """Fill the view.

        Args:
            owner: the module.
            places: by name in the view, the attribute of the module; or a module, for a part that the owner does not
                keep as a module, which cannot be replaced.
        """
        attributes = {name: place for name, place in places.items() if isinstance(place, str)}
        self.__dict__["_shown"] = owner, attributes, dict.fromkeys(places)
        for name, place in places.items():
            part = getattr(owner, place) if isinstance(place, str) else place
            if isinstance(part, nn.Parameter):
                self._parameters[name] = part
            else:
                self._modules[name] = part

    def __setattr__(self, name: str, value: Any) -> None:
        owner, attributes, places = self.__dict__.get("_shown", (None, {}, {}))
        if name in places:
            if name not in attributes:
                self._refuse()
            setattr(owner, attributes[name], value)
        super().__setattr__(name, value)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        owner, attributes, _places = self.__dict__["_shown"]
        places = ", ".join(f"{place} (`{attribute}`)" for place, attribute in attributes.items())
        raise AttributeError(
            f"this is a view of the parts of {type(owner).__name__}: parts {places} can be replaced, but none can be "
            "added or removed, and hooks belong on the parts, or on the module itself."
        )

    __delitem__ = __delattr__ = _refuse
    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = _refuse


class PartsView(View, nn.Sequential):
    """Parts of a module, one after the other.

    Args:
        owner: the module.
        places: the attribute of each part, or a module; see `View`.
    """

    def __init__(self, owner: nn.Module, *places: str | nn.Module) -> None:
        super().__init__()
        self._show(owner, {str(index): place for index, place in enumerate(places)})

    append = extend = insert = pop = View._refuse  # type: ignore[assignment]
