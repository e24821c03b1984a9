"""Time and memory of loading a Llama with random weights, and the speed at which it decodes: ours and transformers.

    python -m benchmarks.loading load              # 1.1 billion parameters in bfloat16, 2.2 GB in a temporary folder
    python -m benchmarks.loading decode            # 0.5 billion parameters, bfloat16 and float32

Each loading runs in a process of its own, in turn, round after round; the files are in the page cache. Both map the
files, so that they are read when weights are used for the first time; the time until a sum over all weights was
computed is therefore printed as well. Memory is the peak
of the process minus what it had before the call, divided by the size of the weights. Decoding also compares with a bare
Llama of the same shape (`bare_llama.py`) and prints which share of the memory's rate the weights were read at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from x_transformers.folders.writing import Entry, write_folder

BIG: dict[str, Any] = {"dim": 2048, "inner": 5632, "depth": 22, "heads": 32, "kv_heads": 4, "vocabulary": 32000}
"""The shape of TinyLlama."""
MIDDLE: dict[str, Any] = {"dim": 1280, "inner": 3584, "depth": 24, "heads": 20, "kv_heads": 20, "vocabulary": 32000}
LIBRARIES = ("ours", "transformers")


def write_llama(folder: Path, shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the folder of a Llama with random weights, one tensor at a time; return the size of the weights."""
    dim, inner, width = shape["dim"], shape["inner"], shape["dim"] // shape["heads"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape["vocabulary"],
        "hidden_size": dim, "intermediate_size": inner, "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"], "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (shape["vocabulary"], dim), "lm_head.weight": (shape["vocabulary"], dim)}
    for layer in range(shape["depth"]):
        block, keys = f"model.layers.{layer}.", shape["kv_heads"] * width
        rows = {"q_proj": dim, "k_proj": keys, "v_proj": keys, "o_proj": dim}
        shapes |= {f"{block}self_attn.{name}.weight": (size, dim) for name, size in rows.items()}
        shapes |= {f"{block}mlp.{name}.weight": (inner, dim) for name in ("gate_proj", "up_proj")}
        shapes[f"{block}mlp.down_proj.weight"] = (dim, inner)
        shapes |= {f"{block}{name}.weight": (dim,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (dim,)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(size, dtype=dtype) if len(size) == 1 else torch.randn(size).mul_(0.02).to(dtype)

    entries = {name: Entry(dtype, size, lambda size=size: draw(size)) for name, size in shapes.items()}
    write_folder(folder, config, entries, "1GB", mark=False)
    return sum(entry.nbytes for entry in entries.values())


def memory(entry: str) -> int:
    """Return the memory of this process in bytes: "VmRSS" now, or "VmHWM" at most until now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{entry}:")[1].split()[0])


def load(library: str, folder: str, dtype: torch.dtype | None = None) -> Any:
    """Load the model of a folder."""
    if library == "ours":
        from x_transformers import load_pretrained

        return load_pretrained(folder, dtype=dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)


def one_loading(library: str, folder: str) -> dict[str, float]:
    """Load once, after a tiny model that imports everything, and return seconds and bytes."""
    with tempfile.TemporaryDirectory() as tiny:
        write_llama(Path(tiny), {"dim": 32, "inner": 32, "depth": 1, "heads": 2, "kv_heads": 1, "vocabulary": 20})
        load(library, tiny)
    before, start = memory("VmRSS"), time.perf_counter()
    model = load(library, folder)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        assert torch.stack([parameter.sum() for parameter in model.parameters()]).isfinite().all()
    return {"seconds": seconds, "used": time.perf_counter() - start, "bytes": memory("VmHWM") - before}


def compare_loading(rounds: int) -> None:
    """Print the medians of both libraries."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_llama(Path(folder), BIG)
        found: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
        for _ in range(rounds):
            for library in LIBRARIES:
                command = [sys.executable, "-m", "benchmarks.loading", "one", "--library", library, "--folder", folder]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[library].append(json.loads(answer.splitlines()[-1]))
    print(f"weights: {size / 1e9:.2f} GB")
    for library, results in found.items():
        seconds, used, most = (
            statistics.median(each[name] for each in results) for name in ("seconds", "used", "bytes")
        )
        print(f"{library:12} {seconds:6.2f} s, {used:6.2f} s until all were used, peak {most / size:.2f} x weights")


def compare_decoding(rounds: int, tokens: int) -> None:
    """Print the tokens per second of ours, transformers and the bare Llama, for one row."""
    from benchmarks.bare_llama import inner_width

    shape = {**MIDDLE, "inner": inner_width(MIDDLE["dim"])}
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), shape)
        for dtype in (torch.bfloat16, torch.float32):
            size, runs = _contestants(folder, shape, dtype, tokens)
            times: dict[str, list[float]] = {name: [] for name in runs}
            rates = []
            for number in range(rounds + 1):
                rates.append(memory_rate())
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if number:  # the first round warms up
                        times[name].append(time.perf_counter() - start)
            rate = statistics.median(rates)
            for name, each in times.items():
                speed = tokens / statistics.median(each)
                share = speed * size / rate
                print(f"{dtype!s:15} {name:12} {speed:7.2f} tokens/s   {share:.2f} of the memory's rate")


@torch.no_grad()
def _contestants(
    folder: str, shape: dict[str, Any], dtype: torch.dtype, tokens: int
) -> tuple[int, dict[str, Callable[[], object]]]:
    """Return the size of the weights, and functions that decode the same number of tokens."""
    from benchmarks.bare import Shape, generate
    from benchmarks.bare_llama import BareLlama
    from x_transformers import AutoregressiveWrapper

    ours = AutoregressiveWrapper(load("ours", folder, dtype))
    theirs = load("transformers", folder, dtype).eval()
    of_bare = Shape(
        vocab=shape["vocabulary"], context=256, layers=shape["depth"], heads=shape["heads"], dim=shape["dim"]
    )
    bare = BareLlama(of_bare).to(dtype).eval()
    prompt = torch.randint(0, shape["vocabulary"], (1, 8))
    greedy: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return sum(parameter.nbytes for parameter in ours.parameters()), {
        "ours": lambda: ours.generate(prompt, tokens, temperature=0.0, cache="static"),
        "transformers": lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy),
        "bare": lambda: generate(bare, prompt, tokens),
    }


def memory_rate() -> float:
    """Return the bytes per second at which a large tensor is summed."""
    large = torch.ones(2**28, dtype=torch.float32)
    large.sum()
    start = time.perf_counter()
    for _ in range(3):
        large.sum()
    return 3 * large.nbytes / (time.perf_counter() - start)


def main() -> None:
    """Run what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "decode", "one"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", choices=LIBRARIES, default="ours")
    parser.add_argument("--folder", default="")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "one":
        print(json.dumps(one_loading(given.library, given.folder)))
    elif given.what == "load":
        compare_loading(given.rounds)
    else:
        compare_decoding(given.rounds, given.tokens)


if __name__ == "__main__":
    main()
