"""Train a small decoder on the bytes of real text.

By default the text is the source of Python's standard library; `--data` takes any file or folder. The run writes
`metrics.jsonl`, `curve.png` and checkpoints to `--out`, and `--resume` continues it from the last checkpoint. Under
`torchrun`, several processes share each batch and the model; they take the same steps as a single process would, and a
run may be resumed with another number of processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import signal
import sys
import time
from typing import Any

import torch
from pictures import learning_curve
from text_data import checksum, open_folder, random_windows, read_text, spaced_windows
from text_model import start_evenly
from tqdm import tqdm
from train_options import parsed

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.durable import replacing
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError, InputError
from x_transformers.training.optimizers import Muon, split_parameters
from x_transformers.training.processes import Processes, end_process, gathered, joined, shard

CONTEXT, BATCH = 128, 8
PROMPT = torch.tensor([*b"def "])


def build_model() -> AutoregressiveWrapper:
    """Build a decoder of 0.85 million parameters, initialized for its optimizers."""
    decoder = Decoder(
        dim=128,
        depth=4,
        heads=4,
        attn_dim_head=32,
        rotary_pos_emb=True,
        rotary_emb_dim=32,
        attn_qk_rmsnorm=True,
        attn_zero_init_output=True,
        ff_zero_init_output=True,
        ff_no_bias=True,
    )
    net = TransformerWrapper(num_tokens=256, max_seq_len=CONTEXT, attn_layers=decoder)
    start_evenly(net)
    return AutoregressiveWrapper(net)


def build_optimizers(model: AutoregressiveWrapper) -> dict[str, torch.optim.Optimizer]:
    """Build Muon for the matrices of the layers, and AdamW for the rest: embeddings, head and gains."""
    split = split_parameters(model)
    groups = [{"params": split.embeddings, "lr": 0.05}, {"params": split.others, "lr": 0.01}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    # in float32, the steps do not depend on the number of processes
    muon = Muon(split.matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_dtype=torch.float32)
    for group in (*adamw.param_groups, *muon.param_groups):
        group["peak_lr"] = group["lr"]
    return {"adamw": adamw, "muon": muon}


class Run:
    """Training run: its state, and the files in its output folder.

    Args:
        options: command line, see `train_options.py`.
        processes: processes that share the run.
    """

    def __init__(self, options: argparse.Namespace, processes: Processes) -> None:
        self.options, self.out, self.processes = options, options.out, processes
        self.train, self.held_out = read_text(options.data, CONTEXT)
        self.data = checksum(self.train, self.held_out)
        torch.manual_seed(options.seed)
        self.model = self.whole = build_model().to(processes.device)
        if processes.count > 1:
            self.whole = copy.deepcopy(self.model)  # unsharded copy, with which the first process evaluates
            self.model = shard(self.model)
        self.optimizers = build_optimizers(self.model)
        self.loss = torch.compile(self.model) if options.compile else self.model
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self.metrics: list[dict[str, Any]] = []
        self._open_folder()

    def _open_folder(self) -> None:
        if self.processes.leads:
            open_folder(self.out)
        checkpoints = self.out / "checkpoints"
        checkpoint = latest_checkpoint(checkpoints)
        if checkpoint is None and checkpoints.is_dir() and any(checkpoints.glob("*step-*")):
            raise SystemExit(f"None of the checkpoints in {checkpoints} is complete; pass another --out.")
        if not self.options.resume:
            if checkpoint is not None:
                raise SystemExit(
                    f"{self.out} already contains a run; continue it with --resume, or pass another --out."
                )
            return
        if checkpoint is None:
            raise SystemExit(f"There is no checkpoint in {self.out} to resume from; start the run without --resume.")
        try:
            progress = load_checkpoint(checkpoint, model=self.model, optimizers=self.optimizers)
        except CheckpointError as error:
            raise SystemExit(f"The run cannot be resumed: {' '.join(str(error).split())}") from error
        own = {"seed": self.options.seed, "data": self.data}
        if not {"step", "seconds", "metrics", *own} <= progress.keys():
            raise SystemExit(f"The checkpoint {checkpoint} is not one of this script; pass another --out.")
        for name, value in own.items():
            if progress[name] != value:
                started = f"--seed {progress['seed']}" if name == "seed" else "other text"
                raise SystemExit(f"The run was started with {started}; resume it with the same --{name}.")
        self.step, self.seconds, self.metrics = progress["step"], progress["seconds"], progress["metrics"]

    def done(self) -> float:
        """Return the completed fraction of the run, in [0, 1]: of its steps, or of its minutes of training."""
        steps, minutes = self.options.steps, self.options.minutes
        return min(self.step / steps if steps else self.seconds / (60 * minutes), 1.0)

    def train_step(self) -> float:
        """Take one step, and return its loss in nats per byte. Learning rates fall linearly to zero over the run."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - self.done())
        tokens = random_windows(self.train, BATCH, CONTEXT, self.options.seed, self.step)
        (loss := self.loss(self.processes.part(tokens).to(self.processes.device))).backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def go(self) -> None:
        """Train until the run is complete, or a signal stops it."""
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        saved, evaluated, smooth = time.monotonic(), self.seconds, math.nan
        form = "{percentage:3.0f}%|{bar:24}| {postfix}"
        with tqdm(total=1.0, disable=not self.processes.leads, bar_format=form) as bar:
            while self.done() < 1 and not self.stopped:
                start = time.perf_counter()
                loss = self.train_step()
                state = (
                    loss,
                    time.perf_counter() - start,
                    self.stopped,
                    time.monotonic() - saved >= self.options.save_every,
                )
                loss, seconds, stopped, due = self.processes.mean(*state)  # all processes decide by the same values
                self.seconds, self.stopped = self.seconds + seconds, stopped > 0
                rate, bits = round(BATCH * CONTEXT / seconds), loss / math.log(2)
                self.metrics.append({"step": self.step, "loss": loss, "bits_per_byte": bits, "tokens_per_second": rate})
                smooth = bits if math.isnan(smooth) else 0.95 * smooth + 0.05 * bits
                bar.n = self.done()
                bar.set_postfix_str(f"step {self.step}  loss {loss:.3f}  {smooth:.3f} bits/byte  {rate:,} tokens/s")
                if self.seconds - evaluated >= self.options.look_every:
                    evaluated = self.seconds
                    self.evaluate(bar, windows=64)
                if due > 0:
                    saved = time.monotonic()
                    self.save()
            if not self.stopped:
                self.evaluate(bar, windows=1024)
        self.save()

    def _stop(self, *_: Any) -> None:
        # the current step is finished first, so that the checkpoint is between two steps
        self.stopped = True

    @torch.no_grad()
    def evaluate(self, bar: tqdm, windows: int) -> None:
        """Evaluate held-out bits per byte, and print a sample."""
        weights = gathered(self.model)
        if not self.processes.leads:
            return
        self.whole.eval().load_state_dict(weights)
        device = self.processes.device
        nats = [self.whole(part.to(device)) for part in spaced_windows(self.held_out, CONTEXT, windows).split(32)]
        self.whole.train()
        held_out = torch.stack(nats).mean().item() / math.log(2)
        self.metrics.append({"step": self.step, "held_out_bits_per_byte": held_out})
        tokens = self.whole.generate(PROMPT.to(device), 160, temperature=0.8, filter_logits_fn="min_p")
        sample = bytes([*PROMPT.tolist(), *tokens.tolist()]).decode("utf-8", errors="replace")
        found = f"step {self.step}, {self.seconds:.0f} s of training: {held_out:.3f} held-out bits per byte"
        bar.write(f"{found}. A sample:\n{sample}\n")

    def save(self) -> None:
        """Write a checkpoint, the metrics and the picture."""
        progress = {"step": self.step, "seconds": self.seconds, "metrics": self.metrics}
        progress |= {"seed": self.options.seed, "data": self.data}
        folder = self.out / "checkpoints"
        save_checkpoint(folder, step=self.step, model=self.model, optimizers=self.optimizers, progress=progress)
        if self.processes.leads:
            lines = "".join(json.dumps(metric) + "\n" for metric in self.metrics)
            with replacing(self.out / "metrics.jsonl") as file:
                file.write_text(lines, encoding="utf-8")
            learning_curve(self.metrics, self.out / "curve.png")


def main() -> None:
    options, code = parsed(__doc__), 0
    with joined(options.device) as processes:
        try:
            (run := Run(options, processes)).go()
            if processes.leads:
                stopped = f"Stopped at step {run.step}; continue with --resume."
                print(stopped if run.stopped else f"{run.out} contains the run.")
        except (SystemExit, InputError, CheckpointError, OSError) as stop:
            code = 2
            if processes.leads:
                print(" ".join(str(stop).split()), file=sys.stderr)
    if processes.count > 1:
        end_process(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
