"""Sharded training in two processes, and the same in one process, for `test_training.py`.

    torchrun --standalone --nproc-per-node 2 tests/sharded.py FOLDER

leaves `losses.json` and a checkpoint in the folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from torch import nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.training import load_checkpoint, save_checkpoint
from x_transformers.training.optimizers import Muon, split_parameters
from x_transformers.training.processes import Processes, end_process, gathered, is_sharded, joined, shard

MODELS: dict[str, dict[str, Any]] = {
    "plain": {
        "attn_kv_heads": 1,
        "rotary_pos_emb": True,
        "attn_qk_norm": True,
        "parallel_block": True,
        "parallel_block_one_norm": True,
    },
    "again": {"checkpoint_every": 1, "rel_pos_bias": True, "add_value_residual": True, "num_residual_streams": 2},
    "tied": {"weight_tie_layers": True, "checkpoint_every": 2, "depth": 3},
    "relaxed": {"weight_tie_layers": True, "tie_lora_rank": 2, "checkpoint_every": 1},
}
"""Widths that two processes cannot halve, blocks that run again or several times, tables and layers that are shared."""
STEPS, ROWS, LENGTH, VOCABULARY = 4, 4, 12, 25


def build(name: str, seed: int) -> AutoregressiveWrapper:
    torch.manual_seed(seed)
    stack = {"dim": 20, "depth": 2, "heads": 3, "attn_dim_head": 7, "verbose": False, **MODELS[name]}
    net = TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=LENGTH, tie_embedding=name != "plain", attn_layers=Decoder(**stack)
    )
    return AutoregressiveWrapper(net, loss_chunk_size=5 if name == "again" else None)


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    split = split_parameters(model)
    adamw = torch.optim.AdamW([*split.embeddings, *split.others], lr=0.01)
    return {"adamw": adamw, "muon": Muon(split.matrices, lr=0.02, ns_dtype=torch.float32)}


def train(
    model: nn.Module, made: dict[str, torch.optim.Optimizer], processes: Processes, first: int = 0, steps: int = STEPS
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        loss = model(processes.part(torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)))
        loss.backward()
        for optimizer in made.values():
            optimizer.step()
            optimizer.zero_grad()
        losses += processes.mean(loss.item())
    return losses


def main(folder: Path) -> None:
    found: dict[str, list[float]] = {}
    with joined() as processes:
        for name in MODELS:
            model = shard(build(name, seed=processes.rank))  # the first process's weights count
            assert is_sharded(model)
            made = optimizers(model)
            found[name] = train(model, made, processes)
            save_checkpoint(folder / name, step=STEPS, model=model, optimizers=made, progress={"name": name})
            found[name] += train(model, made, processes, STEPS)
            assert bool(gathered(model)) == processes.leads
        again = shard(build("plain", seed=5))
        made = optimizers(again)
        assert load_checkpoint(folder / "alone", model=again, optimizers=made) == {"name": "alone"}
        found["resumed"] = train(again, made, processes, STEPS)
        if processes.leads:
            (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process()
