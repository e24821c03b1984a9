"""Frequencies of rotary embeddings, and their scaling to contexts longer than those of the training.

A scaling is a dict as in `rope_scaling` of Hugging Face's configurations: its name as `rope_type`, and numbers. With r
rotated features, `f_k = base ** (-2k / r)`, and L the length of the training (`original_max_position_embeddings`):

    linear    f_k / factor                                                                          (2306.15595)
    dynamic   the base times (factor * length / L - (factor - 1)) ** (r / (r - 2))                  (2309.00071, B.2)
    yarn      linear for low frequencies, f_k for high ones, and a ramp between them                (2309.00071)
    longrope  f_k / short_factor[k] up to the length L, f_k / long_factor[k] for longer ones        (2402.13753)
    llama3    f_k / factor for low frequencies, f_k for high ones, and a ramp between them          (2407.21783)

In the first implementations of "dynamic" and "longrope" frequencies follow the length of each pass, so that keys in a
cache are rotated by other angles than those of a pass over the same tokens. Here they follow from `length`, the number
of tokens that a model is meant for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import ConfigError
from x_transformers.options.schema import require
from x_transformers.options.values import accepts, shown


@dataclass(frozen=True)
class Scaling:
    """One kind of scaling.

    Attributes:
        needs: entries of the dict besides the name.
        may: further entries.
        frequencies: `(settings, base, r) -> (r / 2,)` frequencies.
        factor: the factor of cosines and sines that follows from the settings, unless `attention_factor` is given.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    frequencies: Callable[[Mapping[str, Any], float, int], Tensor]
    factor: Callable[[Mapping[str, Any]], float] = lambda settings: 1.0


def frequencies(base: float, dim: int, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Return the frequencies `(r / 2,)` of `dim` = r rotated features, in float32."""
    if scaling is None:
        return 1.0 / base ** (_pairs(dim) / dim)
    return SCALINGS[scaling["rope_type"]].frequencies(scaling, base, dim)


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """Return the factor of cosines and sines, 1 for most scalings."""
    if scaling is None:
        return 1.0
    given = scaling.get("attention_factor")
    return SCALINGS[scaling["rope_type"]].factor(scaling) if given is None else float(given)


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Check the entries of a scaling, and that they fit each other.

    Raises:
        ConfigError: if an entry is missing, unknown or out of its bounds.
    """
    name = scaling.get("rope_type")
    if name not in SCALINGS:
        known = ", ".join(map(repr, SCALINGS))
        raise ConfigError(f"`rotary_scaling` is {shown(dict(scaling))}; its `rope_type` must be one of {known}.")
    kind = SCALINGS[name]
    for entry in kind.needs:
        require(entry in scaling, f"`rotary_scaling` of type {name!r} needs {entry!r}; add it.")
    for entry, value in scaling.items():
        known = entry == "rope_type" or entry in kind.needs or entry in kind.may
        expected = ", ".join(repr(each) for each in (*kind.needs, *kind.may))
        require(known, f"`rotary_scaling` of type {name!r} has no {entry!r}; its entries are {expected}.")
        if entry != "rope_type":
            _check_entry(name, entry, value)
    low, high = (scaling.get(entry) for entry in _ASCENDING.get(name, ("", "")))
    if low is not None and high is not None:
        lower, higher = _ASCENDING[name]
        require(low < high, f"`rotary_scaling` has {lower!r} = {low} and {higher!r} = {high}; the first must be less.")


def check_width(scaling: Mapping[str, Any], dim: int) -> None:
    """Check a scaling against the number of rotated features.

    Raises:
        ConfigError: if it has other factors than one for each pair, or needs more features.
    """
    for entry in ("short_factor", "long_factor"):
        count = len(scaling.get(entry, ())) or dim // 2
        require(
            count == dim // 2,
            f"`rotary_scaling` has {count} numbers in {entry!r}, but {dim} rotated features have {dim // 2} pairs; "
            "give one number for each.",
        )
    require(
        scaling["rope_type"] != "dynamic" or dim > 2,
        "`rotary_scaling` of type 'dynamic' needs more than 2 rotated features; increase `rotary_emb_dim`.",
    )


_ASCENDING = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
"""Entries of which the first must be less than the second."""

_AT_LEAST_1 = ("factor", "original_max_position_embeddings", "length")


def _check_entry(name: str, entry: str, value: Any) -> None:
    if entry in ("short_factor", "long_factor"):
        fits = accepts(Sequence[float], value) and len(value) > 0 and all(each > 0 for each in value)
        wanted = "a list of positive numbers"
    elif entry == "truncate":
        fits, wanted = isinstance(value, bool), "True or False"
    else:
        least = 1.0 if entry in _AT_LEAST_1 else 0.0
        fits = accepts(float, value) and value >= least and value > 0
        wanted = "a number of at least 1" if least else "a positive number"
    require(fits, f"`rotary_scaling` of type {name!r} has {entry!r} = {shown(value)}; it must be {wanted}.")


def _pairs(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32)


def _linear(settings: Mapping[str, Any], base: float, dim: int) -> Tensor:
    return frequencies(base, dim) / settings["factor"]


def _dynamic(settings: Mapping[str, Any], base: float, dim: int) -> Tensor:
    factor, trained = settings["factor"], settings["original_max_position_embeddings"]
    longer = max(settings["length"] / trained, 1.0)
    return frequencies(base * (factor * longer - (factor - 1)) ** (dim / (dim - 2)), dim)


def _yarn(settings: Mapping[str, Any], base: float, dim: int) -> Tensor:
    trained = settings["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """Return the number of the pair that makes this number of turns over the length of the training."""
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(settings.get("beta_fast", 32)), pair_that_turns(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    # equal ends would divide by zero
    width = last - first if last != first else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    high = frequencies(base, dim)
    return torch.lerp(high, high / settings["factor"], ramp)


def _yarn_factor(settings: Mapping[str, Any]) -> float:
    factor, one, all_dims = settings["factor"], settings.get("mscale"), settings.get("mscale_all_dim")

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0

    return scale(one) / scale(all_dims) if one and all_dims else scale(1.0)


def _longrope(settings: Mapping[str, Any], base: float, dim: int) -> Tensor:
    longer = settings["length"] > settings["original_max_position_embeddings"]
    factors = torch.tensor(settings["long_factor" if longer else "short_factor"], dtype=torch.float32)
    return frequencies(base, dim) / factors


def _longrope_factor(settings: Mapping[str, Any]) -> float:
    factor, trained = settings["factor"], settings["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def _llama3(settings: Mapping[str, Any], base: float, dim: int) -> Tensor:
    high = frequencies(base, dim)
    turns = settings["original_max_position_embeddings"] * high / (2 * math.pi)
    slow, fast = settings["low_freq_factor"], settings["high_freq_factor"]
    return torch.lerp(high / settings["factor"], high, ((turns - slow) / (fast - slow)).clamp(0, 1))


_LENGTH = "original_max_position_embeddings"

SCALINGS = {
    "linear": Scaling(("factor",), (), _linear),
    "dynamic": Scaling(("factor", _LENGTH, "length"), (), _dynamic),
    "yarn": Scaling(
        ("factor", _LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _yarn,
        _yarn_factor,
    ),
    "longrope": Scaling(
        ("factor", _LENGTH, "length", "short_factor", "long_factor"), ("attention_factor",), _longrope, _longrope_factor
    ),
    "llama3": Scaling(("factor", _LENGTH, "low_freq_factor", "high_freq_factor"), (), _llama3),
}
"""The scalings, by the name in `rope_type`."""
