"""Weights are pages of their files: equal to what is read, private, and unchanged if the files are replaced."""

import copy
import io
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
from test_model_files import same
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, load_pretrained
from x_transformers.errors import CheckpointError
from x_transformers.folders import file_memory
from x_transformers.folders.file_memory import PAGE, Piece, file_tensor
from x_transformers.folders.shards import open_shards

FILE = "model.safetensors"
MAPS = pytest.mark.skipif(file_memory.MAP is None, reason="this system reads files into memory")


def net() -> TransformerWrapper:
    layers = Decoder(dim=64, depth=1, heads=2, verbose=False)
    return TransformerWrapper(num_tokens=600, max_seq_len=8, tie_embedding=True, attn_layers=layers)


def large(model: TransformerWrapper) -> list[Tensor]:
    return [each for each in model.parameters() if each.nbytes >= file_memory.SMALLEST]


@pytest.mark.parametrize("maps", [True, False])
def test_pieces_of_a_file(maps: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any pieces, one after the other, are the bytes of the file; writing into them leaves it as it is."""
    monkeypatch.setattr(file_memory, "SMALLEST", 1)
    if not maps:
        monkeypatch.setattr(file_memory, "MAP", None)
    draw, path = random.Random(0), tmp_path / "file"
    data = draw.randbytes(16 * PAGE)
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        for _ in range(500):
            pieces = []
            for _ in range(draw.randint(1, 4)):
                # pieces of whole pages, which are mapped one after the other, and others
                start = draw.choice([7 + PAGE * draw.randint(0, 8), draw.randint(0, 8 * PAGE)])
                size = draw.choice([1, 5, PAGE, 3 * PAGE, draw.randint(1, 4 * PAGE)])
                pieces.append(Piece(file, start, start + size))
            expected = b"".join(data[piece.start : piece.end] for piece in pieces)
            found = file_tensor(pieces, torch.uint8, (len(expected),))
            assert found.numpy().tobytes() == expected
            assert found.untyped_storage().nbytes() == len(expected)
            found.zero_()
        with pytest.raises(EOFError):
            file_tensor([Piece(file, 0, PAGE), Piece(file, 8 * PAGE, 17 * PAGE)], torch.uint8, (10 * PAGE,))
    assert path.read_bytes() == data


@MAPS
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    def resident() -> int:
        return PAGE * int(Path("/proc/self/statm").read_text().split()[1])

    path, half = tmp_path / "file", 2**27
    with path.open("wb") as file:
        file.truncate(2 * half + 16)  # takes no space
    before = resident()
    with path.open("rb", buffering=0) as file:
        # in the opposite order, as the two maps of a gated feedforward
        found = file_tensor(
            [Piece(file, 16 + half, 16 + 2 * half), Piece(file, 16, 16 + half)], torch.int32, (2, 2**25)
        )
    assert resident() - before < half // 8
    assert not found[1, ::PAGE].any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_may_be_replaced(dtype: torch.dtype | None, tmp_path: Path) -> None:
    first, second = net(), net()
    first.save_pretrained(tmp_path)
    loaded = TransformerWrapper.from_pretrained(tmp_path, dtype=dtype)
    assert large(loaded)
    expected = first if dtype is None else copy.deepcopy(first).to(dtype)
    second.save_pretrained(tmp_path)
    assert same(expected, loaded)
    loaded.save_pretrained(tmp_path)
    assert same(expected, loaded)
    assert same(expected, TransformerWrapper.from_pretrained(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    assert same(expected, loaded)


def test_loaded_weights_are_trained(tmp_path: Path) -> None:
    """As those that were never in a file, which do not change."""
    plain, ids = net(), torch.randint(0, 600, (2, 8))
    plain.save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    models = [plain.eval(), TransformerWrapper.from_pretrained(tmp_path), load_pretrained(tmp_path)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
    assert all(same(plain, model) for model in models)
    assert (tmp_path / FILE).read_bytes() == before


def test_loaded_weights_are_copied_and_moved(tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    model = TransformerWrapper.from_pretrained(tmp_path)
    expected = copy.deepcopy(model)
    for weight in large(model):
        saved = io.BytesIO()
        torch.save(weight, saved)
        assert len(saved.getvalue()) < weight.nbytes + 4096  # not the whole file
        assert torch.equal(pickle.loads(pickle.dumps(weight)), weight)
    model.share_memory()
    assert same(expected, model)
    assert same(expected, model.to(torch.float64).to(torch.float32))


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    with open_shards(tmp_path) as shards:
        with (tmp_path / FILE).open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it ends before tensor `token_emb"):
            shards.tensor("token_emb.emb.weight")
