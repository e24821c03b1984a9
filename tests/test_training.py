"""Training: groups of parameters, Muon, and several processes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch
from catalog import BASE, close, tokens
from torch import nn

from x_transformers import AutoregressiveWrapper, XTransformer
from x_transformers.checkpoints.files import load_model
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import ConfigError, InputError
from x_transformers.training import processes
from x_transformers.training.optimizers import Muon, orthogonalized, split_parameters
from x_transformers.training.processes import Processes, gathered, joined, shard


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_the_parameters_of_a_decoder() -> None:
    model = AutoregressiveWrapper(BASE.build(depth=1, attn_qk_norm=True, attn_num_mem_kv=2, rel_pos_bias=True))
    split = split_parameters(model)
    maps = {"to_q", "to_k", "to_v", "to_out", "up", "down"}
    matrices = names(model, split.matrices)
    assert len(matrices) == len(maps)
    assert all(name.startswith("net.attn_layers.layers.") for name in matrices)
    assert names(model, split.embeddings) == {"net.token_emb.emb.weight"}
    others = names(model, split.others)
    assert {"net.to_logits.weight", "net.attn_layers.final_norm.gamma"} <= others
    assert any("rel_pos" in name for name in others)
    assert len(matrices) + 1 + len(others) == len(list(model.parameters()))


def test_only_what_muon_was_made_for() -> None:
    model = BASE.build()
    fewer = split_parameters(model, queries_and_keys=False)
    assert [id(p) for p in fewer.matrices] == [
        id(p) for p in model.parameters() if id(p) in {id(w) for w in model.muon_parameters()}
    ]
    assert len(fewer.matrices) < len(split_parameters(model).matrices)


def test_each_parameter_once() -> None:
    """Also in models of two stacks, with shared tables, frozen parameters and gates from single numbers."""
    model = XTransformer(
        dim=16,
        enc_num_tokens=8,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=8,
        dec_num_tokens=8,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=8,
        tie_token_emb=True,
    )
    frozen = next(p for p in model.parameters() if p.ndim == 2)
    frozen.requires_grad_(False)
    found = [id(p) for part in split_parameters(model) for p in part]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    tied = BASE.build(tie_embedding=True)
    assert names(tied, split_parameters(tied).embeddings) == {"token_emb.emb.weight", "pos_emb.emb.weight"}
    with pytest.raises(ConfigError, match="without a stack"):
        split_parameters(nn.Linear(2, 2))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="compares with torch.optim.Muon, of PyTorch 2.9 and later")
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_the_steps_of_torch(adjust: str | None, nesterov: bool) -> None:
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (5, 5))]
    theirs = copy.deepcopy(ours)
    given = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": adjust, "nesterov": nesterov}
    mine, other = Muon(ours, **given), torch.optim.Muon(theirs, **given)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_directions_are_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert ((values > 0.6) & (values < 1.3)).all()


def test_muon_refuses() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        Muon([nn.Parameter(torch.randn(3))])
    for wrong in ({"lr": -1.0}, {"momentum": -0.1}, {"ns_steps": 0}, {"adjust_lr_fn": "other"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Muon([nn.Parameter(torch.randn(3, 3))], **wrong)  # type: ignore[arg-type]


def test_a_single_process() -> None:
    with joined() as alone:
        assert alone == Processes()
    x = tokens(4, 3)
    assert torch.equal(alone.part(x), x)
    assert alone.mean(1.5, True) == [1.5, True]
    assert torch.equal(Processes(1, 2).part(x), x[2:])
    with pytest.raises(InputError, match="4 rows cannot be divided evenly among 3"):
        Processes(0, 3).part(x)
    model = BASE.build()
    assert gathered(model).keys() == model.state_dict().keys()
    with pytest.raises(ConfigError, match="torchrun"):
        shard(model)


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    split = split_parameters(model)
    adamw = torch.optim.AdamW([{"params": split.embeddings, "lr": 0.1, "peak_lr": 0.1}, {"params": split.others}])
    return {"adamw": adamw, "muon": Muon(split.matrices, lr=0.02)}


def test_checkpoints_keep_optimizers(tmp_path: Path) -> None:
    """Also of parameters that never had a gradient, and numbers that a schedule changed."""
    model, losses = AutoregressiveWrapper(BASE.build(attn_dropout=0.2)).train(), []
    made, x = optimizers(model), tokens(2, 8)

    def step(model: nn.Module, made: dict[str, torch.optim.Optimizer]) -> float:
        loss = model(x)
        loss.backward()
        for optimizer in made.values():
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    model.net.to_logits.requires_grad_(False)
    step(model, made)
    made["adamw"].param_groups[0]["lr"] = 0.07
    path = save_checkpoint(tmp_path, step=1, model=model, optimizers=made, progress={"step": 1})
    losses = [step(model, made) for _ in range(2)]

    other = AutoregressiveWrapper(BASE.build(attn_dropout=0.2)).train()
    other.net.to_logits.requires_grad_(False)
    again = optimizers(other)
    assert load_checkpoint(latest_checkpoint(tmp_path) or path, model=other, optimizers=again) == {"step": 1}
    assert again["adamw"].param_groups[0]["lr"] == 0.07
    assert again["adamw"].param_groups[0]["peak_lr"] == 0.1
    assert [step(other, again) for _ in range(2)] == losses
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(q, p)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.skipif(not processes.ON_CPU, reason=f"`shard` on a CPU needs PyTorch {processes.SINCE}")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Losses of sharded models, and runs that go on in another number of processes, from two to one and back."""
    alone = Processes()
    wanted: dict[str, list[float]] = {}
    for name in sharded.MODELS:
        model = sharded.build(name, seed=0)
        made = sharded.optimizers(model)
        wanted[name] = sharded.train(model, made, alone)
        if name == "plain":
            path = save_checkpoint(
                tmp_path, step=sharded.STEPS, model=model, optimizers=made, progress={"name": "alone"}
            )
            path.rename(tmp_path / "alone")
        wanted[name] += sharded.train(model, made, alone, sharded.STEPS)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(sharded.__file__)
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    for name, losses in wanted.items():
        assert found[name] == pytest.approx(losses, abs=1e-4), name
    assert found["resumed"] == pytest.approx(wanted["plain"][sharded.STEPS :], abs=1e-4)

    for name, losses in wanted.items():
        model = sharded.build(name, seed=1)
        made = sharded.optimizers(model)
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert load_checkpoint(checkpoint, model=model, optimizers=made) == {"name": name}
        assert load_model(checkpoint / "model.safetensors").config == model.config
        assert sharded.train(model, made, alone, sharded.STEPS) == pytest.approx(losses[sharded.STEPS :], abs=1e-4)
