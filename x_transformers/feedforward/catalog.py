"""The feedforwards that a stack can have, and their keywords."""

from __future__ import annotations

import inspect
from typing import Any

from x_transformers.feedforward import channel_mix, experts
from x_transformers.feedforward.channel_mix import ChannelMix
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.options.schema import Schema

SCHEMA = Schema((*experts.FEATURES, channel_mix.FEATURE))


def build(dim: int, keywords: dict[str, Any]) -> FeedForward | Experts | ChannelMix:
    """Build the feedforward that the keywords name, which are those of one layer, without prefix."""
    own = dict(keywords)
    mixes = own.pop("rwkv", False)
    if own.get("experts") is not None:
        return Experts(dim, **own)
    # of a list of layers some may have experts, which the other keywords are meant for
    own = {name: value for name, value in own.items() if name not in experts.OWN}
    if not mixes:
        return FeedForward(dim, **own)
    # its rule refuses keywords of the other one that are given, and these have their defaults
    shared = inspect.signature(ChannelMix).parameters
    return ChannelMix(dim, **{name: value for name, value in own.items() if name in shared})
