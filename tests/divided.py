"""Experts that two processes divide among them, and the same in one process, for `test_divided_experts.py`.

    torchrun --standalone --nproc-per-node 2 tests/divided.py FOLDER

leaves numbers, gradients and a checkpoint in the folder.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.training import load_checkpoint, save_checkpoint
from x_transformers.forward_pass.call import Capture
from x_transformers.modules.unwrap import unwrapped
from x_transformers.routing.routers import Router
from x_transformers.training.expert_parallel import shard_experts
from x_transformers.training.gradients import clip_gradients
from x_transformers.training.optimizers import Muon, split_parameters
from x_transformers.training.processes import ON_CPU, Processes, end_process, joined, mean_load, shard
from x_transformers.training.run import Run
from x_transformers.training.settings import Settings

STEPS, ROWS, LENGTH, VOCABULARY, CLIP = 3, 4, 10, 25, 0.5

MODELS: dict[str, dict[str, Any]] = {
    "gated": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True, "ff_shared_mult": 0.5},
    "biased": {
        "ff_router": "sigmoid",
        "ff_balance_bias": True,
        "ff_balance_loss_weight": 0.02,
        "ff_glu": True,
        "ff_glu_mult_bias": True,
        "ff_post_act_ln": True,
        "checkpoint_every": 1,
    },
    "keys": {"ff_router": "keys", "ff_experts_topk": 1, "ff_router_z_loss_weight": 0.0, "weight_tie_layers": True},
    "one-sided": {"ff_experts_topk": 1, "ff_balance_bias": True},
    "uneven": {"ff_experts": 3},
}
"""Every parameter with an axis of experts, blocks that run again, layers that are shared, and tokens that all choose an
expert of the first process."""

CASES = {
    "gated": "shard",
    "biased": "shard" if ON_CPU else "ddp",
    "keys": "ddp",
    "one-sided": "ddp",
    "gated-replicas": "replicas",
    "uneven": "shard only",
}
"""What averages the gradients of everything but experts. Replicas: each process has all experts. `shard` by itself
gathers experts for each pass, and their number need not be divisible."""
RUN = [name for name, around in CASES.items() if ON_CPU or around == "ddp"]


class Found(NamedTuple):
    numbers: list[float]
    gradients: dict[str, Tensor]


def build(name: str, seed: int) -> AutoregressiveWrapper:
    torch.manual_seed(seed)
    name = name.removesuffix("-replicas")
    options = {"ff_experts": 4, "ff_mult": 1, "ff_router_z_loss_weight": 0.1, **MODELS[name]}
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False, **options)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=stack))
    for module in model.modules():
        if name == "one-sided" and isinstance(module, Router):
            assert module.score_bias is not None
            module.score_bias[0] = 10.0
    return model


def divided(name: str, seed: int) -> nn.Module:
    """Build a model whose experts are divided; the first process's weights count."""
    model, around = build(name, seed), CASES[name]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "experts")) if around == "replicas" else None
    if around != "shard only":
        shard_experts(model, mesh)
    return DistributedDataParallel(model) if around == "ddp" else shard(model, mesh)


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    split = split_parameters(unwrapped(model))
    adamw = torch.optim.AdamW([*split.embeddings, *split.others], lr=0.01)
    return {"adamw": adamw, "muon": Muon(split.matrices, lr=0.02, ns_dtype=torch.float32)}


def whole(t: Any) -> Tensor:
    return (t if type(t) is Tensor else t.full_tensor()).clone()


def train(model: nn.Module, made: dict[str, torch.optim.Optimizer], processes: Processes, first: int = 0) -> Found:
    """Take steps, and return their losses and norms, and the gradients of the first one."""
    numbers, gradients, net = [], {}, unwrapped(model).net
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)
        batch = processes.part(torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator))
        loss, (_, record) = model(batch, return_outputs=True, capture=Capture(reduce_load=mean_load))
        loss.backward()
        if step == first:
            gradients = {name: whole(p.grad) for name, p in unwrapped(model).named_parameters()}
        numbers += [*processes.mean(loss.item()), clip_gradients(model.parameters(), CLIP).item()]
        for optimizer in made.values():
            optimizer.step()
            optimizer.zero_grad()
        if any(isinstance(module, Router) and module.balances for module in net.modules()):
            net.balance_experts_(record, rate=0.1)
    return Found(numbers, gradients)


def results(run: Run) -> list[float]:
    """Return the held-out loss and the balance biases of a run of the command."""
    run.go()
    assert run.held_out is not None
    biases = [module.score_bias for module in run.model.modules() if isinstance(module, Router)]
    return [run.held_out, *(number for bias in biases if bias is not None for number in bias.tolist())]


def settings(out: Path) -> Settings:
    """Return the settings of a run of the command `train`, of a text next to its folder."""
    return Settings(
        data=str(out.with_name("text.txt")),
        preset="bytes",
        context=16,
        rows=4,
        accumulate=2,
        steps=3,
        optimizer="adamw",
        set=(("depth", 1), ("dim", 16), ("ff_experts", 4), ("ff_mult", 1), ("ff_balance_bias", True)),
        balance_rate=0.1,
        shard_experts=True,
        threads=1,
        device="cpu",
        out=out,
    )


def main(folder: Path) -> None:
    numbers: dict[str, list[float]] = {}
    with joined() as processes:
        for name in RUN:
            model = divided(name, seed=processes.rank)
            made = optimizers(model)
            found = train(model, made, processes)
            save_checkpoint(folder / name, step=STEPS, model=model, optimizers=made, progress={"name": name})
            numbers[name] = [*found.numbers, *train(model, made, processes, STEPS).numbers]
            if processes.leads:
                save_file(found.gradients, folder / f"{name}.safetensors")
        again = divided("biased", seed=5)
        made = optimizers(again)
        assert load_checkpoint(folder / "alone", model=again, optimizers=made) == {"name": "alone"}
        numbers["resumed"] = train(again, made, processes, STEPS).numbers
        if ON_CPU:
            numbers["run"] = results(Run(settings(folder / "two"), processes))
        if processes.leads:
            (folder / "found.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_process()
