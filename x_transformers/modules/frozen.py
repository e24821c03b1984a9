"""Applying a part of a model whose weights get no gradient from it, while the rest of the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class FrozenUse:
    """Applies a method of a module with constants for its parameters: gradients reach the arguments only.

    It is no module itself, so that the one that it uses is not registered a second time; a deep copy refers to the
    copy.

    Args:
        module: whose parameters the method reads.
        method: name of the method.
        parts: names of the modules in it that the method reads, or of None where there is no such part.
    """

    def __init__(self, module: nn.Module, method: str, parts: tuple[str, ...]) -> None:
        self._calling, self._parts = _Calling(module, method), parts

    def __call__(self, *args: Any) -> Any:
        """Return what the method returns."""
        constants: dict[str, Tensor] = {}
        for name in self._parts:
            part = getattr(self._calling.module, name)
            if part is not None:
                named = part.named_parameters(prefix=f"module.{name}")
                constants |= {name: parameter.detach() for name, parameter in named}
        return functional_call(self._calling, constants, args)


class _Calling(nn.Module):
    """A module whose call is a method of another one, as `functional_call` wants it."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any) -> Any:
        fn: Callable[..., Any] = getattr(self.module, self.method)
        return fn(*args)
