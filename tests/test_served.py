"""Models outside of Python and of this library: ONNX with onnxruntime, and packages of AOTInductor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import perturb
from torch import Tensor, nn
from torch.export import Dim

from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
SIZES = ((2, 8), (3, 11), (1, 1))
STACK: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "attn_dim_head": 16, "verbose": False}


def tokens(stack: type, **options: Any) -> nn.Module:
    return TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=stack(**STACK, **options))


def ids(batch: int, n: int) -> dict[str, Tensor]:
    return {"x": torch.randint(0, 20, (batch, n))}


def padded(batch: int, n: int) -> dict[str, Tensor]:
    return {**ids(batch, n), "mask": torch.arange(n) < torch.arange(n, n + batch)[:, None] - batch + 1}


LLAMA = {
    "use_rmsnorm": True, "rotary_pos_emb": True, "rotary_interleaved": False, "attn_kv_heads": 1, "ff_glu": True,
    "ff_swish": True, "ff_no_bias": True,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (lambda: tokens(Decoder, **LLAMA), ids),
    "adjacent pairs and a window": (lambda: tokens(Decoder, rotary_pos_emb=True, attn_max_attend_past=4), ids),
    "learned bias": (lambda: tokens(Decoder, rel_pos_bias=True), ids),
    "encoder": (lambda: tokens(Encoder, alibi_pos_bias=True), padded),
    "vision": (
        lambda: ViTransformerWrapper(image_size=8, patch_size=4, num_classes=3, attn_layers=Encoder(**STACK)),
        lambda batch, n: {"img": torch.randn(batch, 3, 8, 8)},
    ),
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, tmp_path: Path) -> None:
    """One file for every batch and length; gradients need not be off."""
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model = perturb(make()).eval()
    example = draw(2, 8)
    sizes = {each: {0: Dim.DYNAMIC} if each == "img" else ANY for each in example}
    program = torch.onnx.export(model, (), kwargs=example, dynamic_shapes=sizes, dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, n in SIZES:
        given = draw(batch, n)
        (got,) = session.run(None, {each: value.numpy() for each, value in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(**given), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_packages_of_inductor(tmp_path: Path) -> None:
    model = perturb(tokens(Decoder, **LLAMA)).eval()
    program = torch.export.export(model, (), ids(2, 8), dynamic_shapes={"x": ANY})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for batch, n in ((2, 8), (3, 11)):
        given = ids(batch, n)
        torch.testing.assert_close(package(**given), model(**given), atol=1e-5, rtol=1e-4)
