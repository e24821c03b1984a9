"""The feedforwards that a stack can have, and their keywords."""

from __future__ import annotations

import inspect
from typing import Any

from x_transformers.errors import ConfigError
from x_transformers.feedforward import channel_mix, experts, feedforward, heavy, routing_options, soft_experts
from x_transformers.feedforward.channel_mix import ChannelMix
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.feedforward.heavy import HeavyFeedForward
from x_transformers.feedforward.soft_experts import SoftExperts
from x_transformers.feedforward.whole_rows import ReadsWholeRows
from x_transformers.options.schema import Schema

SCHEMA = Schema(
    (*feedforward.FEATURES, routing_options.FEATURE, soft_experts.FEATURE, heavy.FEATURE, channel_mix.FEATURE)
)

OWN = {Experts: experts.OWN, SoftExperts: soft_experts.OWN, HeavyFeedForward: heavy.OWN}
"""Networks besides a plain feedforward, and the keywords that only they have."""

AnyFeedForward = FeedForward | Experts | SoftExperts | HeavyFeedForward | ChannelMix


def build(dim: int, keywords: dict[str, Any], *, hides_future: bool = False) -> AnyFeedForward:
    """Build the feedforward that the keywords name, which are those of one layer, without prefix.

    Args:
        dim: width of the stack.
        keywords: at most those of one network have another value than their default.
        hides_future: tokens do not see later ones.

    Raises:
        ConfigError: if a token would see later ones.
    """
    own = dict(keywords)
    mixes = own.pop("rwkv", False)
    network = _network(own)
    # in a list of layers, some may have a network that other keywords are meant for
    foreign = {name for kind, names in OWN.items() if kind is not network for name in names}
    own = {name: value for name, value in own.items() if name not in foreign}
    if not mixes:
        fn = network(dim, **own)
        if hides_future and isinstance(fn, ReadsWholeRows):
            raise ConfigError(fn.refuse_stack())
        return fn
    # its rule refuses keywords of the other one that are given, and these have their defaults
    shared = inspect.signature(ChannelMix).parameters
    return ChannelMix(dim, **{name: value for name, value in own.items() if name in shared})


def _network(own: dict[str, Any]) -> type[FeedForward | Experts | SoftExperts | HeavyFeedForward]:
    """Return the class of the network that the keywords of a layer switch on."""
    if own.get("experts") is not None:
        return Experts
    if own.get("soft_experts") is not None:
        return SoftExperts
    if own.get("heavy_tokens") is not None or own.get("heavy_share") is not None:
        return HeavyFeedForward
    return FeedForward
