"""Speed of recurrences and of layers that have them: `python -m benchmarks.recurrences [--length 2048] [--rounds 5]`.

Compares each chunked kernel with its definition, one step for each token, forward and with gradients, and training
steps of one layer of every causal mixer with one of self-attention. All contestants run in turn, round after round;
times are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import side_by_side
from x_transformers import Decoder
from x_transformers.mixers.catalog import MIXERS, class_of
from x_transformers.recurrences import naive
from x_transformers.recurrences.delta import delta
from x_transformers.recurrences.linear import linear
from x_transformers.recurrences.loop import loop
from x_transformers.recurrences.rank_one import rank_one
from x_transformers.recurrences.stabilized import stabilized

DIM, HEADS = 256, 4


def sums_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a form of an operation with exponential gates whose results are those of the other operations."""

    def numerator_and_state(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        sums, (held, _) = function(*given)
        return sums[0], held

    return numerator_and_state


def network_of(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a recurrent network without dead tokens as a function of inputs, weights and a state."""

    def run_network(x: Tensor, recurrent: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return function(name, x, recurrent, state, None)

    return run_network


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (linear, naive.linear),
    "linear by feature": (linear, naive.linear),
    "delta": (delta, naive.delta),
    "delta by feature": (delta, naive.delta),
    "stabilized": (sums_of(stabilized), sums_of(naive.stabilized)),
    "rank one": (rank_one, naive.rank_one),
    "slstm": (network_of("slstm", loop), network_of("slstm", lambda name, *given: naive.loop(*given, cell=name))),
}

LEFT_OUT = {"shallow"}
"""Layers that are not measured: a causal one maps the whole row for each token."""


def arguments(name: str, length: int, grad: bool) -> list[Tensor | None]:
    """Return the arguments of an operation for one row, with a decay for each head, or for each key feature."""
    width = DIM // HEADS
    q, k, v = (torch.randn(1, HEADS, length, width) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    beta, g = torch.rand(1, HEADS, length), -0.1 * torch.rand(1, HEADS, length)
    if name == "slstm":
        x, recurrent = torch.randn(1, length, 4, HEADS, width), 0.1 * torch.randn(HEADS, width, 4, width)
        return [x.requires_grad_(grad), recurrent.requires_grad_(grad)]
    if name == "rank one":
        rate, decay = torch.rand(1, HEADS, length, width), -0.1 * torch.rand(1, HEADS, length, width)
        return [t.requires_grad_(grad) for t in (q, torch.randn_like(k), v, -k, k * rate, decay)]
    if name.endswith("by feature"):
        g = -0.1 * torch.rand(1, HEADS, length, width)
    # the delta rule has its beta there, and exponential gates have theirs
    given = [q, k, v, *(() if name.startswith("linear") else (beta,)), g]
    return [t.requires_grad_(grad) for t in given]


def run(function: Callable[..., Any], given: list[Tensor | None], grad: bool) -> None:
    """Run an operation, and its backward pass."""
    with torch.set_grad_enabled(grad):
        out, state = function(*given, None)
        if grad:
            torch.autograd.grad(out.sum() + state.sum(), [t for t in given if t is not None])


def kernels(length: int, rounds: int) -> Iterator[str]:
    """Yield a line for each operation."""
    for name, (fast, slow) in KERNELS.items():
        for grad in (False, True):
            given = arguments(name, length, grad)
            taken = side_by_side(
                {"chunked": partial(run, fast, given, grad), "naive": partial(run, slow, given, grad)}, rounds, warmup=1
            )
            what = "forward and backward" if grad else "forward"
            factor = taken["naive"] / taken["chunked"]
            yield f"{name}, {what}: {1e3 * taken['chunked']:.1f} ms, {factor:.1f} times as fast as single steps"


def layers(length: int, rounds: int) -> Iterator[str]:
    """Yield a line for a training step of a layer of each mixer."""
    common = {"dim": DIM, "depth": 1, "heads": HEADS, "attn_dim_head": DIM // HEADS, "only_attn": True}
    x = torch.randn(1, length, DIM)
    sizes = {"hyena": {"mixer_filter_len": length}, "random": {"mixer_len": length}}
    stacks = {
        name: Decoder(**common, mixer=name, verbose=False, **sizes.get(name, {}))
        for name in MIXERS
        if class_of(name).has_causal_form and name not in LEFT_OUT
    }
    taken = side_by_side(
        {name: partial(step, stack, x) for name, stack in {"attention": Decoder(**common), **stacks}.items()},
        rounds,
        warmup=1,
    )
    for name, seconds in taken.items():
        yield f"{name}: {length / seconds:,.0f} tokens a second, {taken['attention'] / seconds:.2f} of attention's"


def step(stack: Decoder, x: Tensor) -> None:
    """Run one training step without the optimizer."""
    stack.zero_grad()
    stack(x).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.length:,} tokens, {DIM} dimensions, {HEADS} heads, float32")
    for line in (*kernels(options.length, options.rounds), *layers(options.length, options.rounds)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
