"""Training run: from text to a model, with checkpoints from which it goes on to the same losses."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.checkpoints.folder import CHECKPOINTS
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError, InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.layers.batch_norms import advance_all_norms, forget_statistics
from x_transformers.layers.explain import count
from x_transformers.training.batches import Batches, spaced_windows
from x_transformers.training.budget import LOOK, Budget
from x_transformers.training.curve import draw_curve
from x_transformers.training.expert_parallel import shard_experts
from x_transformers.training.gradients import clip_gradients
from x_transformers.training.packages import needed
from x_transformers.training.processes import Processes, gathered, shard, wait_for_all
from x_transformers.training.recipe import model_of, optimizers_of
from x_transformers.training.records import Records
from x_transformers.training.schedules import rate_factor
from x_transformers.training.settings import Settings
from x_transformers.training.speed import choose_threads, flops_per_token, peak_flops
from x_transformers.training.texts import Texts
from x_transformers.training.token_files import TokenFiles, Tokens, as_tensor

SAMPLE = 160
LOADS = Capture(losses=True)
BAR = "{percentage:3.0f}%|{bar:24}| {postfix}"


class Run:
    """Training run: its state, and the files in its output folder.

    Args:
        settings: of the run.
        processes: that share the run.

    Attributes:
        held_out: held-out bits per byte of the last evaluation, or None.
        stopped: a signal has stopped the run.

    Raises:
        InputError: if the folder or the text cannot be used; the message says what to change.
        CheckpointError: if the run cannot be resumed.
    """

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings, self.out, self.processes = settings, settings.out, processes
        self.budget = Budget(settings.steps, settings.of_preset("minutes"))
        bar = needed("tqdm", "train", "The progress bar").tqdm
        checkpoint = self._open_folder()
        self.tokens = self._read_tokens(bar.write)
        self.context, rows = settings.of_preset("context"), settings.of_preset("rows")
        self.tokens.check_length(self.context)
        self.budget.held_out = min(self.budget.held_out, len(self.tokens.held_out))
        self.batches = Batches(self.tokens.train, rows, self.context, settings.seed)
        self.model = self.whole = model_of(settings, self.tokens.tokenizer.size).to(processes.device)
        self.parameters, self.flops = count(self.model), flops_per_token(self.model.net, self.context)
        if processes.count > 1:
            self.whole = copy.deepcopy(self.model)  # unsharded copy, which writes samples
            self.model = shard(shard_experts(self.model) if settings.shard_experts else self.model)
        self.balances = self.model.net.has_balance_bias and settings.balance_rate > 0
        if self.balances and settings.loss_chunk:
            raise InputError(
                "`ff_balance_bias` needs the loads of each pass, which --loss-chunk does not return; train with "
                "--loss-chunk 0, or without biases (--balance-rate 0)."
            )
        self.optimizers = optimizers_of(settings, self.model)
        self.step, self.stopped, self.held_out, self.smooth = 0, False, None, None
        threads = settings.threads if checkpoint is None else self._resume(checkpoint)
        self.threads = self._set_threads(threads)
        self.dtype = self._dtype()
        self.peak = peak_flops(processes.device, self.dtype) * processes.count
        if settings.compile:
            self.model.net.attn_layers.compile_blocks()
        self.bar = bar(total=1.0, disable=not processes.leads, bar_format=BAR)
        if processes.leads:
            services = {"tensorboard": settings.tensorboard, "wandb": settings.wandb}
            self.records = Records(self.out, self.step, settings=settings.recorded(), **services)

    # before training

    def _open_folder(self) -> Path | None:
        """Create the folder, and return the checkpoint to resume from."""
        if self.processes.leads:
            open_folder(self.out)
        wait_for_all()
        folder = self.out / CHECKPOINTS
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None and folder.is_dir() and any(folder.glob("*step-*")):
            raise InputError(f"None of the checkpoints in {folder} is complete; pass another --out.")
        if self.settings.resume and checkpoint is None:
            raise InputError(f"There is no checkpoint in {self.out} to resume from; start the run without --resume.")
        if not self.settings.resume and checkpoint is not None:
            raise FolderInUseError(
                f"{self.out} already contains a run; continue it with --resume, or pass another --out."
            )
        return checkpoint

    def _read_tokens(self, report: Callable[[str], None]) -> Tokens:
        """Read the tokens, which the first process writes."""
        settings = self.settings
        texts = Texts(settings.data, settings.field, settings.split, settings.documents)
        folder = settings.tokens or self.out.parent / "tokens"
        files = TokenFiles(folder, texts, settings.of_preset("tokenizer"), settings.of_preset("vocabulary"))
        tokens = self.processes.first(lambda: files.open(report))
        if self.processes.leads:
            tokens.tokenizer.save(self.out)
        return tokens

    def _resume(self, checkpoint: Path) -> int | None:
        """Restore the state of a checkpoint, and return its number of threads."""
        try:
            progress = load_checkpoint(checkpoint, model=self.model, optimizers=self.optimizers)
        except CheckpointError as error:
            raise CheckpointError(f"The run cannot be resumed: {' '.join(str(error).split())}") from error
        own = {"seed": self.settings.seed, "data": self.tokens.checksum, "rows": self.batches.rows}
        if not {"step", "seconds", "threads", *own} <= progress.keys():
            raise CheckpointError(f"The checkpoint {checkpoint} is not one of this command; pass another --out.")
        for name, value in own.items():
            if progress[name] != value:
                started = "other text" if name == "data" else f"--{name} {progress[name]}"
                raise CheckpointError(f"The run was started with {started}; resume it with the same --{name}.")
        self.step = progress["step"]
        self.budget.go_on_from(progress["seconds"], progress.get("spent"))
        return progress["threads"]

    def _set_threads(self, threads: int | None) -> int:
        """Set the number of threads, if there is a choice, and return it; see `choose_threads`."""
        if self.processes.count > 1 or self.processes.device != "cpu":
            return torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
            return threads
        batch = self.batches.at(0)[: max(1024 // self.context, 1)]

        def act() -> None:
            self.model(batch).backward()

        with torch.random.fork_rng(devices=[]):
            chosen = choose_threads(act)
        self.model.zero_grad()
        forget_statistics(self.model)
        return chosen

    def _dtype(self) -> torch.dtype:
        given = self.settings.precision or ("bfloat16" if self.processes.device.startswith("cuda") else "float32")
        return torch.bfloat16 if given == "bfloat16" else torch.float32

    # training

    def done(self) -> float:
        """Return the completed fraction of training, in [0, 1]."""
        return self.budget.done(self.step)

    def loss(self, tokens: Tensor, **arguments: Any) -> Any:
        """Return the mean loss of windows, in nats per token, and what arguments of the pass request besides."""
        device = torch.device(self.processes.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.model(tokens.to(device, non_blocking=True), **arguments)

    def train_step(self) -> Tensor:
        """Take one step, and return its loss."""
        settings = self.settings
        warmup = settings.of_preset("warmup")
        factor = rate_factor(settings.of_preset("schedule"), self.done(), warmup=warmup, decay=settings.decay)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        batch = self.processes.part(self.batches.at(self.step))
        total, records = torch.zeros((), device=self.processes.device), []
        for part in batch.chunk(settings.accumulate):
            if self.balances:
                loss, (_, record) = self.loss(part, return_outputs=True, capture=LOADS)
                records.append(record)
            else:
                loss = self.loss(part)
            loss = loss * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
        if clip := settings.of_preset("clip"):
            clip_gradients(self.model.parameters(), clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        advance_all_norms(self.model)
        if self.balances:
            self.model.net.balance_experts_(records, settings.balance_rate)
        self.step += 1
        return total

    def go(self) -> None:
        """Train until the run is complete, or a signal stops it."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        saved = looked = self.budget.measure()
        try:
            while self.done() < 1 and not self.stopped:
                self.log(*self._some_steps())
                now = self.budget.seconds
                if now - looked >= self.settings.look_every:
                    self.evaluate(LOOK)
                    looked = self.budget.seconds
                if now - saved >= self.settings.save_every:
                    self.save()
                    saved = self.budget.seconds
            if not self.stopped:
                self.evaluate(self.budget.last_evaluation())
            self.save()
            if not self.stopped:
                self.bar.n = 1.0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            if self.processes.leads:
                self.records.close()

    def _some_steps(self) -> tuple[float, float]:
        """Take the steps up to the next line of the metrics; return their mean loss, and tokens per second."""
        steps = self.settings.log_every or (10 if self.processes.device.startswith("cuda") else 1)
        if self.settings.steps is not None:
            steps = min(steps, self.settings.steps - self.step)
        start = self.budget.measure()
        total = torch.stack([self.train_step() for _ in range(steps)]).mean().item()
        # all processes decide by the same values
        loss, self.budget.seconds, seconds, stopped = self.processes.mean(
            total, now := self.budget.measure(), now - start, self.stopped
        )
        self.stopped = stopped > 0
        rate = steps * self.batches.rows * self.context / seconds
        if self.held_out is None:  # a pass without gradients takes a third of the time of a step
            self.budget.expect_evaluation(1 / (3 * rate))
        return loss, rate

    def log(self, loss: float, rate: float) -> None:
        """Record a training loss, in nats per token, and tokens per second."""
        if not self.processes.leads:
            return
        bits, share = self._bits(loss), rate * self.flops / self.peak
        self.smooth = bits if self.smooth is None else 0.95 * self.smooth + 0.05 * bits
        self.records.add(self.step, loss=loss, bits_per_byte=bits, tokens_per_second=round(rate), share_of_peak=share)
        self._show(
            f"step {self.step}  loss {loss:.3f}  {self.smooth:.3f} bits/byte  {rate:,.0f} tokens/s  {share:.0%} of peak"
        )

    def _bits(self, loss: float) -> float:
        """Return bits per byte of a loss in nats per token."""
        return loss / math.log(2) / self.tokens.bytes_per_token

    def _show(self, text: str) -> None:
        self.bar.n = self.budget.shown(self.step)
        self.bar.set_postfix_str(text)

    def _stop(self, *_: Any) -> None:
        # the current step is finished first, so that the checkpoint is between two steps
        self.stopped = True

    # results

    @torch.no_grad()
    def evaluate(self, tokens: int) -> None:
        """Evaluate held-out bits per byte, and print a sample.

        Args:
            tokens: number of held-out tokens at most.
        """
        windows = spaced_windows(self.tokens.held_out, self.context - 1, max(tokens // self.context, 1))
        start = self.budget.measure()
        nats = self._evaluated(windows)
        nats, seconds, self.budget.seconds = self.processes.mean(
            nats, self.budget.measure() - start, self.budget.measure()
        )
        self.budget.expect_evaluation(seconds / windows.numel())
        self.held_out = self._bits(nats)
        sample = self.sample()
        if self.processes.leads:
            self.records.add(self.step, held_out_bits_per_byte=self.held_out, held_out_loss=nats)
            found = f"step {self.step}, {self.budget.seconds:.0f} s: {self.held_out:.3f} held-out bits per byte"
            self.bar.write(f"{found}. A sample:\n{sample}\n")

    def _evaluated(self, windows: Tensor) -> float:
        """Return the mean loss over the windows of this process; all processes run equally many passes."""
        count, rank = self.processes.count, self.processes.rank
        rows = max(min(32, len(windows) // count), 1)
        passes = max(len(windows) // (rows * count), 1)
        rows_of = [windows[(number * count + rank) * rows % len(windows) :][:rows] for number in range(passes)]
        self.model.eval()
        losses = []
        for number, part in enumerate(rows_of, start=1):
            losses.append(self.loss(part) * len(part))
            self._show(f"evaluating {number}/{passes}")
        self.model.train()
        return torch.stack(losses).sum().item() / sum(map(len, rows_of))

    def sample(self) -> str:
        """Return a text that the model writes; an empty one in processes that do not lead. All have to call this."""
        weights = gathered(self.model)
        if not self.processes.leads:
            return ""
        if self.whole is not self.model:
            self.whole.load_state_dict(weights)
        tokenizer, prompt = self.tokens.tokenizer, self.settings.prompt
        if prompt is None and self.settings.data is None:
            prompt = "def "
        ids = as_tensor(self.tokens.held_out[:8]) if prompt is None else _ids(tokenizer.encode([prompt.encode()])[0])
        device = torch.device(self.processes.device)
        options: dict[str, Any] = {"temperature": 0.8, "filter_logits_fn": "min_p", "eos_token": tokenizer.end}
        # samples are drawn when there is time for them, and must not change what training draws
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(self.settings.seed + self.step)
            new = self.whole.generate(ids[None].to(device), self._room_after(ids), **options)
        return tokenizer.decode([*ids.tolist(), *new[0].tolist()])

    def _room_after(self, ids: Tensor) -> int:
        """Return the number of tokens of a sample; a table of positions ends with the context."""
        net = self.whole.net
        if not net.max_seq_len or net.can_cache_kv_outside_max_seq_len:
            return SAMPLE
        return max(min(SAMPLE, net.max_seq_len - len(ids)), 0)

    def save(self) -> None:
        """Write a checkpoint and the picture."""
        progress = {"step": self.step, "seconds": self.budget.seconds, "threads": self.threads}
        progress |= {"seed": self.settings.seed, "data": self.tokens.checksum, "rows": self.batches.rows}
        progress |= {"settings": self.settings.recorded(), "spent": self.budget.asked if self.done() >= 1 else None}
        folder = self.out / CHECKPOINTS
        save_checkpoint(folder, step=self.step, model=self.model, optimizers=self.optimizers, progress=progress)
        if self.processes.leads:
            draw_curve(self.records.metrics, self.title(), self.out / "curve.png")

    def title(self) -> str:
        """Return a line about text, model and result."""
        result = "" if self.held_out is None else f", {self.held_out:.3f} held-out bits per byte"
        return f"{self.tokens.title}: {self.parameters / 1e6:.2f} million parameters, {self.step:,} steps{result}"


class FolderInUseError(InputError):
    """The folder of a new run contains a run."""


def open_folder(folder: Path) -> None:
    """Create a folder.

    Args:
        folder: to write to.

    Raises:
        InputError: if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be written to ({error.strerror}); pass another --out.") from error


def _ids(ids: Any) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long)
