"""PyTorch's own CPU kernels instead of oneDNN's, for passes over a few tokens."""

from __future__ import annotations

import os
import threading

import torch

from x_transformers.models.base import Model

FEW = 4
"""Tokens of all rows for which setting up a primitive takes longer than computing."""


def plain_kernels_serve(net: Model) -> bool:
    """Return True if a pass over few tokens is faster without oneDNN.

    On a CPU oneDNN sets up a primitive for each call: for a GELU of 1,536 numbers this takes 20 us, and the kernel
    itself 5. Other dtypes than float32 are multiplied by oneDNN.
    """
    weight = next(net.parameters())
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


class PlainKernels:
    """Context in which PyTorch's own kernels run instead of oneDNN's.

    PyTorch has one switch for the whole process: other threads compute without oneDNN meanwhile, too, with results that
    differ by rounding. So it is held for a single pass, never while a caller has a token. The last of several contexts
    that overlap, in this thread or in others, leaves the switch as the first one found it, whatever was raised.
    """

    _lock = threading.Lock()
    _holders: list[int] = []  # noqa: RUF012 (one list for the process: the threads that are within)
    _found = True

    def __enter__(self) -> None:
        kind = PlainKernels
        with kind._lock:
            if not kind._holders:
                kind._found = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            kind._holders.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        kind = PlainKernels
        with kind._lock:
            kind._holders.remove(threading.get_ident())
            if not kind._holders:
                torch.backends.mkldnn.enabled = kind._found


def _forget_other_threads() -> None:
    """In a forked child only the thread that forked goes on: no other one will leave its context."""
    kind = PlainKernels
    others = [holder for holder in kind._holders if holder != threading.get_ident()]
    for holder in others:
        kind._holders.remove(holder)
    if others and not kind._holders:
        torch.backends.mkldnn.enabled = kind._found
    kind._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=PlainKernels._lock.acquire,
        after_in_parent=PlainKernels._lock.release,
        after_in_child=_forget_other_threads,
    )
