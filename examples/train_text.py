"""Train a small decoder on real text for 90 seconds.

By default the text is the source of Python's standard library; `--data` takes any file or folder. The run writes
`metrics.jsonl`, `curve.png` and checkpoints to `--out`, and `--resume` continues it from the last checkpoint. Under
`torchrun`, several processes share each batch and the model; they take the same steps as a single process would, and a
run may be resumed with another number of processes.

It is the command `python -m x_transformers train` with these defaults; `pretrain.py` is the same for larger models.
"""

from pathlib import Path

from x_transformers.training.train import train

DEFAULTS = {"preset": "tiny", "out": Path("runs/train_text")}


def main() -> None:
    train(description=__doc__, **DEFAULTS)


if __name__ == "__main__":
    main()
