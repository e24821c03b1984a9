"""Episodic memory: learned keys and values that every self-attention sees besides those of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.decoding.loop import check_next_token_net
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.names import passes_on
from x_transformers.models.delegate import ModelDelegate
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.state_dict import LoadsWhole, ReadsReference
from x_transformers.options.configured import Configured
from x_transformers.options.schema import at_least

PATH = "episodic_mems"
"""Name of the memory in `EpisodicMemoryWrapper`, and among the paths of what is adapted at test time."""

GIVEN_HERE = ("self_attn_additional_kv", "additional_kv_mask")


class EpisodicMemories(LoadsWhole):
    """Keys and values `(2, depth, heads, seq_len, dim_head)`, from N(0, 0.02^2).

    Args:
        depth: number of self-attentions.
        heads: number of their key/value heads.
        seq_len: number of keys of each.
        dim_head: width of a head.
    """

    def __init__(self, depth: int, heads: int, seq_len: int, dim_head: int) -> None:
        super().__init__()
        at_least(1, depth=depth, heads=heads, seq_len=seq_len, dim_head=dim_head)
        self.mem_kv = nn.Parameter(torch.randn(2, depth, heads, seq_len, dim_head) * 0.02)
        # the second draw is what checkpoints and seeds of the reference expect
        nn.init.normal_(self.mem_kv, std=0.02)

    def forward(self) -> Tensor:
        """Return the keys and values."""
        return self.mem_kv


class EpisodicMemoryWrapper(Configured, ReadsReference, ModelDelegate):
    """A model whose self-attentions see learned keys and values, in front of all others and without a position.

    Args:
        net: the model.
        episodic_mem_len: number of keys of each self-attention.

    Raises:
        ConfigError: if the model has no self-attention, or its self-attentions have different heads, or keys that are
            wider than values.
    """

    def __init__(self, net: TransformerWrapper, episodic_mem_len: int) -> None:
        super().__init__()
        at_least(1, episodic_mem_len=episodic_mem_len)
        stack = check_next_token_net(net).attn_layers
        shapes = {(each.kv_heads, each.shape.dim_head, each.shape.value_dim_head) for each in stack.attentions("a")}
        if not shapes:
            raise ConfigError(
                "`episodic_mem_len` adds keys to self-attentions, of which the stack has none; leave it at 0."
            )
        if len(shapes) > 1 or any(k != v for _, k, v in shapes):
            raise ConfigError(
                f"`episodic_mem_len` keeps keys and values of all self-attentions in one tensor; here (key/value heads,"
                f" width of keys, width of values) are {sorted(shapes)}, and must be one, with equal widths."
            )
        if stack.polar_pos_emb is not None:
            raise ConfigError(
                "`episodic_mem_len` adds keys of the width of a head, and with `polar_pos_emb` keys are twice as wide; "
                "use rotary positions, or leave it at 0."
            )
        ((heads, width, _),) = shapes
        weight = next(net.parameters())
        self.net = net
        count = stack.sequence.count("a", stack.sequence.order)
        self.episodic_mems = EpisodicMemories(count, heads, episodic_mem_len, width).to(weight.device, weight.dtype)

    def get_additional_kv(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values, `(b, heads, L, d)` each, for every self-attention that runs.

        Args:
            batch_size: number of rows b.
        """
        mem_kv = self.episodic_mems()
        if mem_kv.ndim == 5:  # adapted at test time, each row has its own
            mem_kv = mem_kv.expand(batch_size, *mem_kv.shape)
        keys, values = mem_kv.unbind(1)
        return list(zip(keys.unbind(1), values.unbind(1), strict=True))

    @passes_on("net")
    def forward(self, x: Ids, **kwargs: Any) -> Any:
        """Run the model with the memory.

        Args:
            x: `(b, n)` ids.
            kwargs: of the model's pass, except for other additional keys and values.
        """
        for name in GIVEN_HERE:
            if kwargs.get(name) is not None:
                raise InputError(
                    f"`{name}` cannot be given to a model with episodic memory, which is in the same place, and always "
                    "visible; drop it, or set `episodic_mem_len = 0`."
                )
        x = checked_ids(x, self)
        return self.net(x, self_attn_additional_kv=self.get_additional_kv(x.shape[0]), **kwargs)
