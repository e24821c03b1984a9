"""Models other than `TransformerWrapper` in one form: how to build, feed and read each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from catalog import perturb
from torch import Tensor

from x_transformers import ContinuousTransformerWrapper, Decoder, MultiInputTransformerWrapper, XValTransformerWrapper

Inputs = Mapping[str, Tensor]
STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
NUMERIC = 3


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of model.

    Attributes:
        make: the class, with what its examples have in common.
        draw: `(b, n)` to inputs by name, `(b, n, ...)` each.
        feed: inputs to the arguments of a pass.
        read: what a pass returns to `(b, n, w)`.
    """

    name: str
    make: Callable[..., Any]
    draw: Callable[[int, int], Inputs]
    feed: Callable[[Inputs], tuple[Any, ...]]
    read: Callable[[Any], Tensor]

    def __str__(self) -> str:
        return self.name

    def build(self, stack: type = Decoder, layers: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """A perturbed model in evaluation mode."""
        return perturb(self.make(attn_layers=stack(**STACK, **(layers or {})), **options)).eval()

    def run(self, model: Any, inputs: Inputs, **arguments: Any) -> Tensor:
        return self.read(model(*self.feed(inputs), **arguments))

    def decode(self, model: Any, inputs: Inputs, chunks: list[int], *, cache: Any = None, **arguments: Any) -> Tensor:
        """Chunk by chunk through a cache."""
        outputs, end = [], 0
        for chunk in chunks:
            start, end = end, end + chunk
            part = {name: t[:, start:end] for name, t in inputs.items()}
            out, cache = model(
                *self.feed(part), cache=cache, input_not_include_cache=True, return_intermediates=True, **arguments
            )
            outputs.append(self.read(out))
        return torch.cat(outputs, dim=1)


def _xval(b: int, n: int) -> Inputs:
    ids = torch.randint(0, 6, (b, n))
    ids[:, ::3] = NUMERIC
    numbers = torch.randn(b, n).masked_fill(ids != NUMERIC, float("nan"))
    return {"x": ids, "x_num": numbers}


KINDS = (
    Kind(
        "continuous",
        lambda **options: ContinuousTransformerWrapper(**{"dim_in": 6, "dim_out": 5, "max_seq_len": 32, **options}),
        lambda b, n: {"x": torch.randn(b, n, 6)},
        lambda inputs: (inputs["x"],),
        lambda out: out,
    ),
    Kind(
        "probabilistic",
        lambda **options: ContinuousTransformerWrapper(
            **{"dim_in": 6, "dim_out": 5, "max_seq_len": 32, "probabilistic": True, "post_emb_norm": True, **options}
        ),
        lambda b, n: {"x": torch.randn(b, n, 6)},
        lambda inputs: (inputs["x"],),
        lambda out: torch.cat(tuple(out), dim=-1),
    ),
    Kind(
        "xval",
        lambda **options: XValTransformerWrapper(
            **{"num_tokens": 6, "numerical_token_id": NUMERIC, "max_seq_len": 32, **options}
        ),
        _xval,
        lambda inputs: (inputs["x"], inputs["x_num"]),
        lambda out: torch.cat((out[0], out[1].unsqueeze(-1)), dim=-1),
    ),
    Kind(
        "multi_input",
        lambda **options: MultiInputTransformerWrapper(
            **{"num_tokens": {"note": 20, "pitch": 8}, "max_seq_len": 32, **options}
        ),
        lambda b, n: {"note": torch.randint(0, 20, (b, n)), "pitch": torch.randint(0, 8, (b, n))},
        lambda inputs: (dict(inputs),),
        lambda out: torch.cat((out["note"], out["pitch"]), dim=-1),
    ),
)
