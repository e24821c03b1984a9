"""Peak resident memory of a few training steps: `python -m benchmarks.memory bare|ours` prints bytes."""

from __future__ import annotations

import resource
import sys

import torch
import torch.nn.functional as F

from benchmarks import contestants
from benchmarks.bare import Shape


def main(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    shape = Shape()
    model = contestants.bare(shape) if name == "bare" else contestants.ours(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = contestants.batch(shape, 16)
    for _ in range(3):
        if name == "bare":
            loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        else:
            loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(sys.argv[1])
