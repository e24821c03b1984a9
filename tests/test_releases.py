"""Folders that earlier releases saved are still read, and their models still return what they returned.

    python tests/test_releases.py --write

adds the folders of this release to `tests/releases`. They are written once and never changed afterwards.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import x_transformers
from x_transformers import (
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
    load_pretrained,
)

FOLDER = Path(__file__).with_name("releases")
STACK: dict[str, Any] = {"dim": 8, "depth": 1, "heads": 2, "attn_dim_head": 4, "verbose": False}
IDS = {"x": torch.tensor([[1, 5, 2, 7, 3]])}


def _llama() -> nn.Module:
    options = {"use_rmsnorm": True, "rotary_pos_emb": True, "ff_glu": True, "ff_swish": True, "attn_kv_heads": 1}
    stack = Decoder(**STACK, **options, rotary_scaling={"rope_type": "linear", "factor": 2.0})
    return TransformerWrapper(num_tokens=9, max_seq_len=8, use_abs_pos_emb=False, tie_embedding=True, attn_layers=stack)


def _memories() -> nn.Module:
    stack = Decoder(**STACK, alibi_pos_bias=True, attn_num_mem_kv=2, attn_gate_values=True, num_residual_streams=2)
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, num_memory_tokens=2, attn_layers=stack)
    return AutoregressiveWrapper(net, pad_value=1, ignore_index=-2)


def _vision() -> nn.Module:
    return ViTransformerWrapper(image_size=4, patch_size=2, num_classes=3, attn_layers=Encoder(**STACK))


def _translator() -> nn.Module:
    sizes = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in
             {"num_tokens": 9, "depth": 1, "heads": 2, "max_seq_len": 8}.items()}  # fmt: skip
    return XTransformer(dim=8, tie_token_emb=True, **sizes)


def _translate(model: Any, src: Tensor, tgt: Tensor) -> Tensor:
    return model.decoder.net(tgt, context=model.encoder(src, return_embeddings=True))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Callable[..., Any]]] = {
    "llama": (_llama, IDS, lambda model, x: model(x)),
    "memories": (_memories, IDS, lambda model, x: model.net(x)),
    "vision": (_vision, {"img": torch.linspace(-1, 1, 48).view(1, 3, 4, 4)}, lambda model, img: model(img)),
    "translator": (_translator, {"src": IDS["x"], "tgt": IDS["x"].flip(-1)}, _translate),
}
CASES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*"))


def test_this_release_is_there() -> None:
    assert {f"{x_transformers.__version__}/{name}" for name in MODELS} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_folders_of_releases(case: str, tmp_path: Path) -> None:
    made, inputs, run = MODELS[case.partition("/")[2]]
    model = load_pretrained(FOLDER / case)
    wanted = load_file(FOLDER / case / "outputs.safetensors")["outputs"]
    torch.testing.assert_close(run(model, **inputs), wanted, atol=1e-5, rtol=1e-4)
    assert type(model) is type(made())
    # and in the present format
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_pretrained(tmp_path), **inputs), run(model, **inputs))


def write() -> None:
    torch.manual_seed(0)
    for name, (make, inputs, run) in MODELS.items():
        folder = FOLDER / x_transformers.__version__ / name
        if folder.exists():
            continue
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(folder, max_shard_size="4KB" if name == "memories" else "5GB")  # type: ignore[operator]
            save_file({"outputs": run(model, **inputs)}, folder / "outputs.safetensors")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
