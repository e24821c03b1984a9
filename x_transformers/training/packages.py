"""Optional packages, imported when they are first used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from x_transformers.errors import ConfigError


def needed(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        extra: the extra of this package that installs it.
        purpose: subject of the message, such as "a tokenizer".

    Raises:
        ConfigError: if the package is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{purpose} needs the package `{package}`, which is not installed; install it with "
            f"`pip install 'x-transformers[{extra}]'`."
        )
    return importlib.import_module(module)
