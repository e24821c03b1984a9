"""The command `train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from x_transformers.training.command_line import Parser, add_flags, read_options, typed
from x_transformers.training.presets import PRESETS
from x_transformers.training.processes import end_process, joined
from x_transformers.training.refusals import REFUSALS, one_sentence
from x_transformers.training.run import FolderInUseError, Run
from x_transformers.training.settings import Settings, settings_of_run


def train(
    arguments: Sequence[str] | None = None, description: str | None = None, prog: str | None = None, **defaults: Any
) -> None:
    """Train a model on text: the command `train`, and the scripts `train_text.py` and `pretrain.py`.

    Args:
        arguments: of the command line; default those of this process.
        description: of the command.
        prog: name of the command.
        defaults: of flags, where they differ from those of `Settings`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def read(**defaults: Any) -> Settings:
        parser = Parser(prog=prog, description=description)
        add_flags(parser, Settings, **defaults)
        return read_options(Settings, parser.parse_args(given))

    settings = read(**defaults)
    if settings.resume:
        with one_sentence():
            settings = read(**{**defaults, **_settings_of_run(settings, given)})
    code = 0
    with joined(settings.device) as processes:
        try:
            run = Run(settings, processes)
            run.go()
            if processes.leads:
                _tell(run, given)
        except REFUSALS as error:
            code = 2
            if processes.leads:
                used = isinstance(error, FolderInUseError)
                hint = f" To continue: {_again(given)}; for text: {typed('generate', settings.out)}" if used else ""
                print(" ".join(str(error).split()) + hint, file=sys.stderr)
    if processes.count > 1:
        end_process(code)
    if code:
        sys.exit(code)


def _settings_of_run(settings: Settings, given: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the run to resume; a number of minutes that is given replaces one of steps."""
    found = settings_of_run(settings.out)
    if any(word.split("=")[0] == "--minutes" for word in given):
        found.pop("steps", None)
    return found


def _again(given: Sequence[str]) -> str:
    """Return the command that continues the run of this one."""
    words = [*(word for word in given if word != "--resume"), "--resume"]
    script = sys.argv[0]
    if script.endswith(".py") and not script.endswith("__main__.py"):
        return typed(*words, script=script)
    return typed("train", *words)


def _tell(run: Run, given: Sequence[str]) -> None:
    """Print where a run has ended, and the commands that come next."""
    if run.stopped:
        print(f"Stopped at step {run.step}; to continue: {_again(given)}")
        return
    print(f"{run.title()} in {run.budget.seconds:.0f} s. {run.out} contains the run: its curve, metrics, checkpoints.")
    prompt = "def " if run.settings.data is None else "The "
    print("Next:")
    print(f"  {typed('generate', run.out, '--prompt', prompt, '--stream')}")
    sizes = list(PRESETS)
    larger = sizes[min(sizes.index(run.settings.preset) + 1, len(sizes) - 1)]
    larger = "10m" if larger == "tiny" else larger
    data = [] if run.settings.data is None else ["--data", run.settings.data]
    print(f"  {typed('train', '--preset', larger, '--minutes', 10, '--out', run.out.parent / larger, *data)}")
