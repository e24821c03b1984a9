"""Train a language model on text: a tokenizer, packed documents, a preset, and everything that a real run needs.

    python examples/pretrain.py --preset 10m --data FOLDER_OR_FILE --out runs/mine
    python examples/pretrain.py --preset 124m --data hf:HuggingFaceFW/fineweb-edu/sample-10BT --steps 20000
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --preset 1b --data hf:allenai/c4/en --compile

The text is tokenized once, into files that are mapped into memory, and every run over the same text uses them. `--set`
takes any keyword of the model: `--set attn_kv_heads=2 --set ff_relu_squared=true --set ff_glu=false`. The run writes
`metrics.jsonl`, `curve.png`, `tokenizer.json` and checkpoints to `--out`; `--resume` continues it from the last
checkpoint with the same data in the same order. Under `torchrun`, the model is sharded over the processes (FSDP2).

It is the command `python -m x_transformers train` with these defaults. To change what flags do not cover, copy the
few lines of `x_transformers/training/run.py` that you need.
"""

from pathlib import Path

from x_transformers.training.train import train

DEFAULTS = {"preset": "tiny", "out": Path("runs/pretrain"), "save_every": 60.0, "look_every": 60.0}


def main() -> None:
    train(description=__doc__, **DEFAULTS)


if __name__ == "__main__":
    main()
