"""The feedforwards that a stack can have, and their keywords."""

from __future__ import annotations

import inspect
from typing import Any

from x_transformers.feedforward import channel_mix, feedforward
from x_transformers.feedforward.channel_mix import ChannelMix
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.options.schema import Schema

SCHEMA = Schema((*feedforward.FEATURES, channel_mix.FEATURE))


def build(dim: int, keywords: dict[str, Any]) -> FeedForward | ChannelMix:
    """Build the feedforward that the keywords name, which are those of one layer, without prefix."""
    own = dict(keywords)
    if not own.pop("rwkv", False):
        return FeedForward(dim, **own)
    # its rule refuses keywords of the other one that are given, and these have their defaults
    shared = inspect.signature(ChannelMix).parameters
    return ChannelMix(dim, **{name: value for name, value in own.items() if name in shared})
