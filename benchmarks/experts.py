"""Speed of mixtures of experts: `python -m benchmarks.experts [--tokens 2048] [--rounds 15] [--threads 2]`.

Compares training steps of one layer of experts with those of the dense feedforward with as many active parameters, and
passes of a single token. All contestants run in turn, round after round; times are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import side_by_side
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.feedforward import FeedForward

DIM = 256
GATED = {"glu": True, "swish": True, "no_bias": True}
SIZES = {"8 experts of 512, 2 used": (8, 2, 512), "64 experts of 128, 4 used": (64, 4, 128)}


def train(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run one training step without the optimizer."""
    layer.zero_grad()
    layer(x).backward(gradient)


@torch.no_grad()
def read(layer: nn.Module, x: Tensor) -> None:
    """Run one pass."""
    layer(x)


def layers(tokens: int, rounds: int) -> Iterator[str]:
    """Yield a line for each size and form of feedforward."""
    x, token = torch.randn(1, tokens, DIM, requires_grad=True), torch.randn(1, 1, DIM)
    gradient = torch.randn(1, tokens, DIM)
    for name, (experts, topk, inner) in SIZES.items():
        for form, options in (("plain", {}), ("gated", GATED)):
            dense = FeedForward(DIM, mult=topk * inner / DIM, **options)
            sparse = Experts(DIM, mult=inner / DIM, experts=experts, experts_topk=topk, **options)
            found = {"dense": dense, "experts": sparse}
            steps = side_by_side({key: partial(train, each, x, gradient) for key, each in found.items()}, rounds)
            passes = side_by_side({key: partial(read, each, token) for key, each in found.items()}, 10 * rounds)
            yield (
                f"{name}, {form}: a training step takes {1e3 * steps['experts']:.1f} ms, "
                f"{steps['experts'] / steps['dense']:.2f} times as long as dense; a single token "
                f"{1e6 * passes['experts']:.0f} us, {passes['experts'] / passes['dense']:.1f} times"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, {options.tokens:,} tokens, {DIM} dimensions, float32")
    for line in layers(options.tokens, options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
