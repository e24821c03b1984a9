"""Settings of a training run, which are the flags of its command."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from x_transformers.checkpoints.folder import CHECKPOINTS, TRAINING, latest_checkpoint
from x_transformers.checkpoints.plain_data import read_sealed, unpack
from x_transformers.errors import CheckpointError, ConfigError
from x_transformers.training.command_line import default_device, device, flag, number
from x_transformers.training.presets import PRESETS, Preset, read_setting
from x_transformers.training.schedules import SCHEDULES


def read_flag_setting(text: str) -> tuple[str, Any]:
    """Read `key=value` of a command line; see `read_setting`."""
    try:
        return read_setting(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. A number that is None is that of the preset."""

    # text
    data: str | None = flag(
        None,
        "a file or folder of text, JSONL, or hf:NAME for a dataset of the Hugging Face hub; by default Python's "
        "standard library",
    )
    field: str = flag("text", "field of JSONL and datasets that contains the text")
    split: str = flag("train", "split of a dataset")
    documents: int = flag(0, "number of documents to read at most; 0 for all", number(int, 0), metavar="N")
    tokenizer: str | None = flag(
        None, "bytes, bpe (trained on the text), or the path of a tokenizer.json; default that of the preset"
    )
    vocabulary: int | None = flag(None, "tokens of a bpe; default that of the preset", number(int, 257), metavar="N")
    tokens: Path | None = flag(None, "folder for the tokens of texts; default `tokens` next to --out", Path)

    # model
    preset: str = flag("tiny", "model", choices=tuple(PRESETS))
    set: tuple[tuple[str, Any], ...] = flag(
        (), "any keyword of the model, several times", read_flag_setting, metavar="KEY=VALUE"
    )
    context: int | None = flag(None, "tokens of a window; default that of the preset", number(int, 2), metavar="N")

    # optimization
    rows: int | None = flag(None, "windows of a step; default that of the preset", number(int, 1), metavar="N")
    accumulate: int = flag(1, "passes that a step is divided into", number(int, 1), metavar="N")
    optimizer: str = flag("muon", "muon for matrices and adamw for the rest, or adamw", choices=("muon", "adamw"))
    lr: float | None = flag(None, "peak learning rate of adamw; default that of the preset", number(float, 0))
    muon_lr: float | None = flag(None, "peak learning rate of muon; default that of the preset", number(float, 0))
    embedding_lr: float | None = flag(
        None, "peak learning rate of embeddings in a run with muon; default that of the preset", number(float, 0)
    )
    weight_decay: float = flag(0.0, "decoupled decay of matrices", number(float, 0))
    schedule: str | None = flag(None, "learning rate over the run; default that of the preset", choices=SCHEDULES)
    warmup: float | None = flag(
        None, "fraction of the run that warms up; default that of the preset", number(float, 0, 1), metavar="FRACTION"
    )
    decay: float = flag(0.2, "fraction of the run over which wsd falls", number(float, 0, 1), metavar="FRACTION")
    clip: float | None = flag(
        None, "bound of the norm of gradients, 0 for none; default that of the preset", number(float, 0), metavar="NORM"
    )
    balance_rate: float = flag(
        1e-3, "step of the balance biases of routers (ff_balance_bias), 0 for none", number(float, 0, 1)
    )
    seed: int = flag(0, "of weights and of the order of the data", number(int, 0, 2**32 - 1))

    # budget
    minutes: float | None = flag(
        None, "duration of the run, everything included; default that of the preset", number(float, 0.001)
    )
    steps: int | None = flag(None, "number of training steps, instead of --minutes", number(int, 1), metavar="N")

    # machine
    device: str = flag(default_device(), "cpu, cuda, ...", device)
    threads: int | None = flag(None, "threads on a CPU; default the fastest in a trial", number(int, 1), metavar="N")
    precision: str | None = flag(
        None, "of matrix products; default bfloat16 on a GPU, else float32", choices=("float32", "bfloat16")
    )
    compile: bool = flag(False, "compile the model block by block")
    recompute: int = flag(0, "keep only the input of every n-th block (activation checkpointing)", number(int, 0))
    shard_experts: bool = flag(
        False, "in several processes, divide experts among them instead of gathering all of them in every pass"
    )
    loss_chunk: int = flag(0, "tokens whose logits are in memory at once; 0 for all", number(int, 0), metavar="N")

    # results
    out: Path = flag(Path("runs/train"), "folder of the run", Path)
    resume: bool = flag(False, "continue the run in --out, with its settings where no others are given")
    save_every: float = flag(
        30.0, "seconds between checkpoints, each with a picture", number(float, 0), metavar="SECONDS"
    )
    look_every: float = flag(
        20.0, "seconds between evaluations, each with a sample", number(float, 0), metavar="SECONDS"
    )
    log_every: int | None = flag(
        None, "steps between lines of metrics.jsonl; default 1 on a CPU, else 10", number(int, 1), metavar="N"
    )
    prompt: str | None = flag(None, "beginning of samples; default that of the held-out text")
    tensorboard: bool = flag(False, "also write the metrics for TensorBoard")
    wandb: str | None = flag(None, "also send the metrics to this project of Weights & Biases", metavar="PROJECT")

    @property
    def chosen(self) -> Preset:
        """The preset."""
        return PRESETS[self.preset]

    def of_preset(self, name: str) -> Any:
        """Return a setting, or that of the preset if it is None.

        Args:
            name: of both.
        """
        value = getattr(self, name)
        return getattr(self.chosen, name) if value is None else value

    def recorded(self) -> dict[str, Any]:
        """Return what the results of a run depend on, as plain data."""
        left_out = {"out", "resume", "save_every", "look_every", "tokens", "tensorboard", "wandb", "device", "prompt"}
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}
        return values | {"set": dict(self.set)}


def settings_of_run(out: Path) -> dict[str, Any]:
    """Return the settings that a run has recorded: nothing without a complete checkpoint, or in one of another program.

    Args:
        out: folder of the run.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None or not (checkpoint / TRAINING).is_file():
        return {}
    found = unpack(read_sealed(checkpoint / TRAINING).get("progress", {}).get("settings", {}), _no_tensor)
    known = {each.name for each in fields(Settings)}
    found = {name: value for name, value in found.items() if name in known}
    return {**found, "set": tuple(found["set"].items())} if "set" in found else found


def _no_tensor(name: str) -> Any:
    raise CheckpointError(f"settings are plain data, but {name} is a tensor")
