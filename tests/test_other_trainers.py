"""Models train in other people's loops, and resume there: Lightning, Accelerate, Hugging Face's Trainer, torchtitan's.

The packages are those of the extra `trainers`; a loop whose package is missing is skipped. Each trains 20 steps, in one
go and interrupted after 10, to the same losses. The model has no dropout, since a loader draws from its generator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.utils.data import DataLoader, Dataset

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.modules.unwrap import unwrapped

STEPS, HALF, ROWS, LENGTH, VOCABULARY = 20, 10, 2, 12, 17

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages are not ours to mend


class Texts(Dataset[dict[str, Tensor]]):
    """Rows that count up from different tokens; the same ones each time."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"x": (torch.arange(LENGTH) * (1 + number % 3) + number) % VOCABULARY}


def build() -> AutoregressiveWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def loader(start: int = 0, steps: int = STEPS) -> DataLoader[dict[str, Tensor]]:
    rows = torch.utils.data.Subset(Texts(), range(start * ROWS, (start + steps) * ROWS))
    return DataLoader(rows, batch_size=ROWS)


Train = Callable[[Path, int, int], tuple[AutoregressiveWrapper, list[float]]]
"""Train in a folder from a step to another one, resuming if the first is not 0; return the model and its losses."""


def with_lightning(folder: Path, start: int, end: int) -> tuple[AutoregressiveWrapper, list[float]]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = build(), []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss = self.model(batch["x"])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    trainer = lightning.Trainer(
        max_epochs=2 if start else 1,  # each call is an epoch
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, place = Module(), folder / "lightning.ckpt"
    trainer.fit(module, loader(start, end - start), ckpt_path=place if start else None, weights_only=False)
    trainer.save_checkpoint(place)
    return module.model, module.losses


def with_accelerate(folder: Path, start: int, end: int) -> tuple[AutoregressiveWrapper, list[float]]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain = build()
    model, optimizer, batches = accelerator.prepare(plain, adamw(plain), loader(start, end - start))
    if start:
        accelerator.load_state(str(folder / "accelerate"))
    losses = []
    for batch in batches:
        loss = model(batch["x"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(str(folder / "accelerate"))
    return unwrapped(accelerator.unwrap_model(model)), losses


def with_trainer(folder: Path, start: int, end: int) -> tuple[AutoregressiveWrapper, list[float]]:
    from transformers import Trainer, TrainingArguments

    class Losing(nn.Module):
        """The trainer expects a dict with the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = build(), []

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            loss = self.model(x)
            self.losses.append(loss.item())
            return {"loss": loss}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Texts())

    model = Losing()
    given = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=end,
        save_steps=HALF,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = InOrder(model=model, args=given, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{start}") if start else None)
    return model.model, model.losses


def with_a_loop_of_torchtitan(folder: Path, start: int, end: int) -> tuple[AutoregressiveWrapper, list[float]]:
    """Blocks compiled one by one, a distributed checkpoint of model and optimizer, clipping, a schedule."""
    import torch.distributed.checkpoint as dcp

    model = build()
    model.net.attn_layers.compile_blocks(backend="eager")
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
    place = folder / "distributed"
    if start:
        model_state, optimizer_state = states.get_state_dict(model, optimizer)
        kept = {"model": model_state, "optimizer": optimizer_state, "noise": torch.get_rng_state(), "step": 0}
        dcp.load(kept, checkpoint_id=str(place), no_dist=True)
        states.set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
        torch.set_rng_state(kept["noise"])
        assert kept["step"] == start
        for _ in range(start):
            schedule.step()
    losses = []
    for batch in loader(start, end - start):
        loss = model(batch["x"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model_state, optimizer_state = states.get_state_dict(model, optimizer)
    kept = {"model": model_state, "optimizer": optimizer_state, "noise": torch.get_rng_state(), "step": end}
    dcp.save(kept, checkpoint_id=str(place), no_dist=True)
    return model, losses


LOOPS: list[tuple[str | None, Train]] = [
    ("lightning", with_lightning),
    ("accelerate", with_accelerate),
    ("transformers", with_trainer),
    (None, with_a_loop_of_torchtitan),
]


@pytest.mark.parametrize(("package", "train"), LOOPS, ids=[train.__name__ for _, train in LOOPS])
def test_a_model_trains_and_resumes(package: str | None, train: Train, tmp_path: Path) -> None:
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs `{package}` of the extra `trainers`")
    (whole := tmp_path / "whole").mkdir()
    (halves := tmp_path / "halves").mkdir()
    model, losses = train(whole, 0, STEPS)
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    _, first = train(halves, 0, HALF)
    resumed, second = train(halves, HALF, STEPS)
    assert first == losses[:HALF]
    assert second == pytest.approx(losses[HALF:], abs=1e-6)
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    tokens = model.generate(torch.arange(3)[None], 5, temperature=0.0)
    assert tokens.shape == (1, 5)
