"""Hybrid heads: a recurrent or other module in parallel to attention, averaged with it per head (arXiv 2411.13676).

`out_h <- (1 - m) RMSNorm(out_h) + m RMSNorm(module(x)_h)`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, ValueContext, ValueMod
from x_transformers.attention.values.base import SequenceRunner, SequenceState
from x_transformers.cache import Entry, Shape
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.modules.norms import MultiheadRMSNorm
from x_transformers.ops import reference_head_order, split_heads
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class HybridOptions:
    hybrid_module: nn.Module | None = opt(
        None, "module in parallel to attention, (b, n, dim) to (b, n, heads * value width), and a state if any; copied"
    )
    hybrid_mask_kwarg: str | None = opt(None, "name of its keyword for the mask, if attention is not causal")
    hybrid_fold_axial_dim: int | None = opt(
        None, "number k of rows over which tokens are dealt: the module sees every k-th token"
    )
    hybrid_learned_mix: bool = opt(False, "learn the share of the module for each head and token, instead of 1/2")

    def __post_init__(self) -> None:
        fold = self.hybrid_fold_axial_dim
        require(fold is None or fold >= 1, f"`hybrid_fold_axial_dim` is {fold}; it must be at least 1.")


class HybridBranch(ValueMod):
    """Average with a parallel module: `out <- (1 - m) RMSNorm(out) + m RMSNorm(module(x))`, m = 1/2 or `sigmoid(W x)`.

    The module runs only over visible tokens: padding and hidden tokens are removed from its sequence, and recurrent
    memory is put in front. If it returns a second output, that is its state, which the cache keeps. For a module
    without state the cache keeps the inputs, and each pass runs the module over all of them.

    Args:
        shape: widths of the attention.
        options: the module, and how to run it.

    Raises:
        ConfigError: if a recurrent module has other widths, or if a bidirectional one is in causal attention.
    """

    reference: ClassVar = {
        "hybrid_norms.0.gamma": "norm.gamma",
        "hybrid_norms.1.gamma": "branch_norm.gamma",
        "hybrid_mix.weight": "mix.weight",
        "hybrid_module.fn.": "module.",
    }
    per_head: ClassVar = {"norm.gamma": (0,), "branch_norm.gamma": (0,), "mix.weight": (0,)}

    def __init__(self, shape: AttentionShape, options: HybridOptions) -> None:
        super().__init__()
        assert options.hybrid_module is not None
        self.module = copy.deepcopy(options.hybrid_module)
        self.recurrent = any(isinstance(each, nn.RNNBase) for each in self.module.modules())
        # without a state the module runs over the whole past in every pass
        self.whole_past = not self.recurrent
        self.bidirectional = any(getattr(each, "bidirectional", False) is True for each in self.module.modules())
        self.heads, self.order = shape.heads, reference_head_order(shape.heads, shape.kv_heads)
        self.width, self.mask_name = shape.value_dim_head, options.hybrid_mask_kwarg
        # the states of PyTorch's recurrent modules have layers first and the batch second, even with `batch_first`
        self.batch_axis = 1 if self.recurrent else getattr(self.module, "state_batch_dim", 0)
        self.rows = options.hybrid_fold_axial_dim or 1
        self._check(shape)
        # An output that should be zero is zero up to rounding, for example the logarithm of a sum of weights (`laser`)
        # where all values are zero. Divided by a smaller length, its rounding errors would become a direction.
        self.norm = MultiheadRMSNorm(self.width, shape.heads, eps=1e-6)
        self.branch_norm = MultiheadRMSNorm(self.width, shape.heads)
        self.mix = nn.Linear(shape.dim, shape.heads, bias=False) if options.hybrid_learned_mix else None

    @property
    def runner(self) -> SequenceRunner:
        """Runs the module that is in place over sequences."""
        return SequenceRunner(self.module, self.rows, self.batch_axis)

    def _check(self, shape: AttentionShape) -> None:
        if shape.causal and self.bidirectional:
            raise ConfigError(
                "`hybrid_module` is bidirectional, so that a causal attention would see the future; build it with "
                "`bidirectional = False`."
            )
        if not isinstance(self.module, nn.RNNBase):
            return
        width_out = (self.module.proj_size or self.module.hidden_size) * (2 if self.module.bidirectional else 1)
        if not self.module.batch_first:
            raise ConfigError("`hybrid_module` expects the sequence axis first; build it with `batch_first = True`.")
        if self.module.input_size != shape.dim or width_out != self.heads * self.width:
            raise ConfigError(
                f"`hybrid_module` maps {self.module.input_size} features to {width_out}; here it must map `dim` = "
                f"{shape.dim} to heads * value width = {self.heads * self.width}."
            )

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {} if self.recurrent else {"hybrid_input": (1, shape.dim)}

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        if seen.x.shape[1] == 0:  # recurrent modules of PyTorch refuse empty sequences
            return out
        branch = split_heads(self._check_output(self._branch(seen), seen.x.shape[1]), self.heads)
        # the module was written for the reference's order of grouped heads, from which ours differs
        branch = branch if self.order is None else branch[:, self.order]
        share = 0.5 if self.mix is None else split_heads(self.mix(seen.x), self.heads).sigmoid()
        return self.norm(out) * (1 - share) + self.branch_norm(branch.to(out.dtype)) * share

    def _check_output(self, y: Tensor, n: int) -> Tensor:
        if y.shape[1:] != (n, self.heads * self.width):
            raise ShapeError(
                f"`hybrid_module` returned shape {tuple(y.shape)}; it must be (b, {n}, {self.heads * self.width}), or "
                f"(b, {self.heads}, {n}, {self.width})."
            )
        return y

    def _branch(self, seen: ValueContext) -> Tensor:
        """Run the module over the tokens of this pass, continuing from earlier passes; returns `(b, n, h * e)`."""
        call, n = seen.layer.call, seen.x.shape[1]
        if call.causal and self.bidirectional:
            raise InputError(
                "`hybrid_module` is bidirectional; `causal = True` would let it see the future. Drop one of them."
            )
        entry = seen.layer.entry if call.causal else None
        state = None if entry is None else SequenceState.read(entry)
        if entry is not None and state is None and not call.aligned and not self.recurrent:
            return self._branch_over_past(entry, seen)
        x, token_mask = seen.x, _token_mask(seen, call.query.index)
        if state is None:  # a state includes recurrent memory already
            x, token_mask = _with_memory(x, token_mask, seen)
        if self.mask_name is not None and not call.causal:
            y, _ = self.runner.run_batch(x, None, **{self.mask_name: token_mask})
        elif token_mask is None and (self.rows == 1 or entry is None):
            y, state = self.runner.run_batch(x, state)
        else:
            # hidden tokens leave gaps; and folded rows have different lengths, which a cache must continue
            y, state = self.runner.run_ragged(x, token_mask, state, pad=not call.causal)
        if entry is not None and state is not None:
            state.write(entry)
        elif entry is not None and not self.recurrent:
            entry.grow("hybrid_input", seen.x[:, None])
        return y[:, -n:]

    def _branch_over_past(self, entry: Entry, seen: ValueContext) -> Tensor:
        """Run a module without state over cached and new inputs, and return its output at the new tokens."""
        keys, index = seen.layer.call.keys, seen.layer.call.query.index
        x, token_mask = _with_memory(
            entry.grow("hybrid_input", seen.x[:, None]).squeeze(1), _token_mask(seen, keys.index), seen
        )
        if token_mask is None and self.rows == 1:
            y, _ = self.runner.run_batch(x, None)
        else:
            y, _ = self.runner.run_ragged(x, token_mask, None, pad=False)
        # keys lie at the end of the output, after recurrent memory
        return y[:, torch.searchsorted(keys.index, index) + y.shape[1] - keys.length]


def _token_mask(seen: ValueContext, index: Tensor) -> Tensor | None:
    """Return `(b, n)` bool, True for visible tokens among those that arrived at `index`; None if all are visible."""
    keys = seen.layer.call.keys
    return None if keys.token_mask is None else keys.token_mask[:, torch.searchsorted(keys.index, index)]


def _with_memory(x: Tensor, token_mask: Tensor | None, seen: ValueContext) -> tuple[Tensor, Tensor | None]:
    """Put recurrent memory in front of inputs, and its visibility in front of theirs."""
    if seen.layer.memory is None:
        return x, token_mask
    m, key_mask = seen.layer.memory.shape[-2], seen.layer.keys.token_mask
    if key_mask is not None:
        own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if token_mask is None else token_mask
        token_mask = torch.cat((key_mask[:, :m].expand(x.shape[0], -1), own), dim=1)
    return seen.layer.with_memory(x), token_mask


def build(options: HybridOptions, shape: AttentionShape, **_: Any) -> HybridBranch:
    """Build the branch of one attention."""
    return HybridBranch(shape, options)


def _example(module: type[nn.GRU] | type[nn.LSTM]) -> nn.RNNBase:
    """Return a small recurrent module, the same in every process, and leave the generator of the importing program."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(16, 32, batch_first=True)


_UNTRACED = "rows with hidden tokens run one by one, and PyTorch does not trace recurrent modules"

FEATURE = Feature(
    name="hybrid",
    group="attn",
    slot="values",
    options=HybridOptions,
    enabled=lambda options: options.hybrid_module is not None,
    build=build,
    summary="a recurrent module in parallel to attention",
    paper="2411.13676",
    self_attention_only=True,
    unpackable="`hybrid_module` would run from one document into the next",
    examples=(
        {"attn_hybrid_module": _example(nn.GRU)},
        {"attn_hybrid_module": _example(nn.LSTM), "attn_hybrid_fold_axial_dim": 2, "attn_hybrid_learned_mix": True},
    ),
    exempt={
        "compile": _UNTRACED,
        "compiled_decoding": _UNTRACED,
        "shared_heads": "a user's module returns heads in the order in which the reference groups them",
    },
)
