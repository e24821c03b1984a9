"""Train a small decoder on the bytes of real text, and watch it learn.

By default the text is the source of Python's own standard library; `--data` takes any file or folder. The run leaves
`metrics.jsonl`, `curve.png` and checkpoints in `--out`, and `--resume` continues it where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pictures import learning_curve
from text_data import open_folder, random_windows, read_text, spaced_windows
from tqdm import tqdm

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError

CONTEXT, BATCH = 128, 8
PROMPT = torch.tensor([*b"def "])


def build_model() -> AutoregressiveWrapper:
    """A decoder of 0.85 million parameters; embeddings of unit variance and a head near zero suit its optimisers."""
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
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)
    return AutoregressiveWrapper(net)


def build_optimizers(model: AutoregressiveWrapper) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest: embeddings, head and gains."""
    layers = list(model.net.attn_layers.parameters())
    matrices, gains = [p for p in layers if p.ndim == 2], [p for p in layers if p.ndim != 2]
    groups = [
        {"params": [model.net.token_emb.emb.weight], "lr": 0.05},
        {"params": [*gains, *model.net.to_logits.parameters()], "lr": 0.01},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for group in (*adamw.param_groups, *muon.param_groups):
        group["peak_lr"] = group["lr"]
    return {"adamw": adamw, "muon": muon}


class Run:
    """A training run: its state, and what it leaves in its folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.train, self.held_out = read_text(options.data, CONTEXT)
        torch.manual_seed(options.seed)
        self.model = build_model().to(options.device)
        self.optimizers = build_optimizers(self.model)
        self.loss = torch.compile(self.model) if options.compile else self.model
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self.metrics: list[dict[str, Any]] = []
        self._open_folder()

    def _open_folder(self) -> None:
        open_folder(self.out)
        checkpoint = latest_checkpoint(self.out / "checkpoints")
        if not self.options.resume:
            if checkpoint is not None:
                raise SystemExit(f"{self.out} holds a run already; continue it with --resume, or pass another --out.")
            return
        if checkpoint is None:
            raise SystemExit(f"There is no checkpoint in {self.out} to resume from; start the run without --resume.")
        try:
            place = {"model": self.model, "optimizers": self.optimizers, "device": self.options.device}
            progress = load_checkpoint(checkpoint, **place)
        except CheckpointError as error:
            raise SystemExit(f"The run cannot be resumed: {error}") from error
        if progress["seed"] != self.options.seed:
            raise SystemExit(f"The run was started with --seed {progress['seed']}; resume it with the same seed.")
        self.step, self.seconds, self.metrics = progress["step"], progress["seconds"], progress["metrics"]

    def done(self) -> float:
        """How much of the run is over, between 0 and 1: of its steps, or of its minutes of training."""
        steps, minutes = self.options.steps, self.options.minutes
        return min(self.step / steps if steps else self.seconds / (60 * minutes), 1.0)

    def train_step(self) -> float:
        """One step; the learning rates fall linearly to zero over the run. Returns nats per byte."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - self.done())
        tokens = random_windows(self.train, BATCH, CONTEXT, self.options.seed, self.step)
        (loss := self.loss(tokens.to(self.options.device))).backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def go(self) -> None:
        """Train until the run is over or somebody stops it."""
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        saved, looked, smooth = time.monotonic(), self.seconds, math.nan
        bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:24}| {postfix}")
        while self.done() < 1 and not self.stopped:
            start = time.perf_counter()
            loss = self.train_step()
            seconds = time.perf_counter() - start
            self.seconds += seconds
            rate, bits = round(BATCH * CONTEXT / seconds), loss / math.log(2)
            self.metrics.append({"step": self.step, "loss": loss, "bits_per_byte": bits, "tokens_per_second": rate})
            smooth = bits if math.isnan(smooth) else 0.95 * smooth + 0.05 * bits
            bar.n = self.done()
            bar.set_postfix_str(f"step {self.step}  loss {loss:.3f}  {smooth:.3f} bits/byte  {rate:,} tokens/s")
            if self.seconds - looked >= self.options.look_every:
                looked = self.seconds
                self.look(bar, windows=64)
            if time.monotonic() - saved >= self.options.save_every:
                saved = time.monotonic()
                self.save()
        if not self.stopped:
            self.look(bar, windows=1024)
        bar.close()
        self.save()

    def _stop(self, *_: Any) -> None:
        # the step under way is finished first, so that what is saved is a whole one
        self.stopped = True

    @torch.no_grad()
    def look(self, bar: tqdm, windows: int) -> None:
        """Held-out bits per byte, and a sample."""
        self.model.eval()
        nats = [
            self.model(part.to(self.options.device))
            for part in spaced_windows(self.held_out, CONTEXT, windows).split(32)
        ]
        self.model.train()
        held_out = torch.stack(nats).mean().item() / math.log(2)
        self.metrics.append({"step": self.step, "held_out_bits_per_byte": held_out})
        tokens = self.model.generate(PROMPT.to(self.options.device), 160, temperature=0.8, filter_logits_fn="min_p")
        sample = bytes([*PROMPT.tolist(), *tokens.tolist()]).decode("utf-8", errors="replace")
        bar.write(
            f"step {self.step}, {self.seconds:.0f} s of training: {held_out:.3f} held-out bits per byte. A sample:"
        )
        bar.write(f"{sample}\n")

    def save(self) -> None:
        """A checkpoint, the metrics and the picture."""
        progress = {"step": self.step, "seconds": self.seconds, "metrics": self.metrics, "seed": self.options.seed}
        folder = self.out / "checkpoints"
        save_checkpoint(folder, step=self.step, model=self.model, optimizers=self.optimizers, progress=progress)
        lines = "".join(json.dumps(metric) + "\n" for metric in self.metrics)
        (self.out / "metrics.jsonl").write_text(lines, encoding="utf-8")
        learning_curve(self.metrics, self.out / "curve.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or folder of text; default Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/train_text"), help="folder of the run")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, evaluation apart")
    parser.add_argument("--steps", type=int, help="of training, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the model first")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--save-every", type=float, default=30, metavar="SECONDS", help="checkpoint and picture")
    parser.add_argument("--look-every", type=float, default=20, metavar="SECONDS", help="evaluate and sample")
    try:
        run = Run(parser.parse_args())
        run.go()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            sys.exit(2)
        raise
    print(f"Stopped at step {run.step}; continue with --resume." if run.stopped else f"{run.out} holds the run.")


if __name__ == "__main__":
    main()
