"""Speed of training: the operations of a token, the peak of the hardware, and the number of threads that is fastest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from x_transformers.models.transformer import TransformerWrapper

TRIAL = 0.5
"""Seconds to find the number of threads."""

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense operations per second in 16 bits, from data sheets, by a part of the name of the GPU; longer parts first."""


def flops_per_token(net: TransformerWrapper, context: int) -> int:
    """Return the floating-point operations of a token in a training step: three times those of matrix products.

    Attention counts with half of the keys of the window, those that a causal token sees on average.

    Args:
        net: the model.
        context: number of tokens of a window.
    """
    layers = sum(row.flops for row in net.explain(seq_len=context).rows)
    return 3 * (layers + 2 * net.emb_dim * net.num_tokens)


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of the hardware: of the data sheet of a GPU, or measured with a large product.

    Args:
        device: name of the device.
        dtype: of the product.
    """
    if device.startswith("cuda") and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    size = 4096 if device.startswith("cuda") else 768
    with torch.no_grad():
        a = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds(lambda: a @ a, device) for _ in range(4))
    return 2 * size**3 / seconds


def _seconds(act: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    act()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def choose_threads(act: Callable[[], object]) -> int:
    """Set the number of threads of this process to the fastest, found in a trial of half a second, and return it.

    Threads that wait for each other are slower than one if the cores are busy with something else. A number that the
    user has set (`OMP_NUM_THREADS`, or that `torchrun` has set) is kept.

    Args:
        act: what is timed, without effects.
    """
    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    candidates = sorted({1, most, *(2**k for k in range(1, most.bit_length()) if 2**k < most)})
    act()  # the first one also loads and allocates
    best: dict[int, float] = {}
    end = time.perf_counter() + TRIAL
    while time.perf_counter() < end or not best:  # by turns, so that a slow moment affects all
        for threads in candidates:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            act()
            best.setdefault(threads, 0.0)
            best[threads] += time.perf_counter() - start
    chosen = min(best, key=lambda threads: best[threads])
    torch.set_num_threads(chosen)
    return chosen
