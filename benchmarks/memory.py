"""Peak resident memory of a few training steps, in bytes: `python -m benchmarks.memory NAME`.

`bare` and `ours` are the contestants of `benchmarks.run`; `wide` is ours with a vocabulary of 32,768 tokens, `chunked`
the same with its loss in chunks, `again` with blocks that run again for their gradients, and `lean` with both.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import contestants
from benchmarks.bare import Shape

WIDE = Shape(vocab=32768)
CHUNK = 256
SPARING: dict[str, dict[str, Any]] = {
    "wide": {},
    "chunked": {"loss_chunk_size": CHUNK},
    "again": {"checkpoint_every": 1},
    "lean": {"loss_chunk_size": CHUNK, "checkpoint_every": 1},
}


def main(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    shape = WIDE if name in SPARING else Shape()
    model = contestants.bare(shape) if name == "bare" else contestants.ours(shape, **SPARING.get(name, {}))
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
