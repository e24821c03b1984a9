"""`SpeechTransformer`: rows of different lengths, folders, and what is refused."""

import json
from typing import Any

import pytest
import torch
from catalog import close, perturb

from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, SpeechTransformer, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError

STACK: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}


def encoder(layers: dict[str, Any] | None = None, **options: Any) -> ContinuousTransformerWrapper:
    stack = Encoder(**{**STACK, **(layers or {})})
    return ContinuousTransformerWrapper(**{"max_seq_len": 8, **options}, attn_layers=stack)


def decoder(**layers: Any) -> TransformerWrapper:
    stack = Decoder(**{**STACK, "cross_attend": True, **layers})
    return TransformerWrapper(num_tokens=11, max_seq_len=16, attn_layers=stack)


def build(**options: Any) -> SpeechTransformer:
    return perturb(SpeechTransformer(**{"num_mels": 5, "encoder": encoder(), "decoder": decoder(), **options})).eval()


def given() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, 13), torch.randint(0, 11, (3, 6))


@torch.no_grad()
def test_convolutions() -> None:
    front = build().front
    x, first, second = torch.randn(1, 5, 13), front.first, front.second
    hidden = torch.nn.functional.conv1d(x, first.weight, first.bias, padding=1)
    hidden = torch.nn.functional.gelu(hidden)
    out = torch.nn.functional.conv1d(hidden, second.weight, second.bias, stride=2, padding=1)
    close(front(x), torch.nn.functional.gelu(out).transpose(1, 2))


@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2}, {"dim_in": 6}])
@torch.no_grad()
def test_rows_of_different_lengths(options: dict[str, Any]) -> None:
    """Each row has the features, loss and generated tokens that it has by itself, whatever comes after its frames."""
    model, (audio, target), lens = build(encoder=encoder(**options)), given(), torch.tensor([13, 8, 5])
    features, mask = model.encode(audio, lens)
    assert mask is not None
    tokens = model.generate(audio, target[:, :1], 4, lens, temperature=0.0)
    streamed = torch.stack(list(model.stream(audio, target[:, :1], 4, lens, temperature=0.0)), dim=1)
    assert tokens.tolist() == streamed.tolist()
    losses = []
    for row, length in enumerate(lens.tolist()):
        own, own_target = audio[row : row + 1, :, :length], target[row : row + 1]
        wanted, _ = model.encode(own)
        assert int(mask[row].sum()) == wanted.shape[1] == (length + 1) // 2
        close(features[row][mask[row]], wanted[0])
        losses.append(model(own, own_target))
        assert model.generate(own, own_target[:, :1], 4, temperature=0.0).tolist() == tokens[row : row + 1].tolist()
    close(model(audio, target, lens), torch.stack(losses).mean())
    beyond = torch.where(torch.arange(13) < lens[:, None, None], audio, torch.nan)
    close(model(beyond, target, lens), model(audio, target, lens))


def test_every_parameter_learns() -> None:
    model, (audio, target) = build().double().train(), given()
    model(audio.double(), target, torch.tensor([13, 8, 5])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


@torch.no_grad()
def test_configurations_and_other_widths() -> None:
    other = {"encoder": encoder({"dim": 24}, dim_out=12), "decoder": decoder(cross_attn_dim_context=12)}
    model, (audio, target) = build(**other), given()
    again = SpeechTransformer.from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(audio, target), model(audio, target))
    assert build().bfloat16()(audio.bfloat16(), target).isfinite()
    with pytest.raises(StateDictError, match="no encoder of spectrograms"):
        model.export_reference_state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: {"num_mels": 0}, "`num_mels` is 0"),
        (lambda: {"encoder": decoder()}, "it must be a ContinuousTransformerWrapper"),
        (lambda: {"decoder": 3}, "it must be a TransformerWrapper"),
        (lambda: {"decoder": decoder(custom_layers=("a", "f"), depth=None)}, "cross"),
        (lambda: {"encoder": encoder(average_pool_embed=True)}, "drop its `average_pool_embed`"),
        (lambda: {"encoder": encoder(probabilistic=True)}, "`probabilistic`"),
        (lambda: {"encoder": encoder({"cross_attend": True})}, "drop `cross_attend`"),
        (lambda: {"encoder": encoder(dim_out=6)}, "the width 6, and the decoder attends to contexts of the width 16"),
        (lambda: {"encoder": encoder({"dim": 24})}, "the width 24, and the decoder"),
        (lambda: {"decoder": decoder(cross_attend=False)}, "set `cross_attend = True`"),
    ],
)
def test_bad_options_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options())


@pytest.mark.parametrize(
    ("audio", "lens", "words"),
    [
        (torch.zeros(3, 4, 13), None, r"`audio` has shape \(3, 4, 13\)"),
        (torch.zeros(3, 5, 0), None, "at least one frame"),
        (torch.zeros(3, 5, 13).long(), None, "must be floating"),
        (torch.zeros(3, 5, 19), None, "`max_seq_len` = 8"),
        (torch.zeros(3, 5, 13), torch.ones(2).long(), r"`lens` has shape \(2,\)"),
        (torch.zeros(3, 5, 13), torch.tensor([1, 2, 14]), "`lens`"),
    ],
)
def test_bad_spectrograms_are_refused(audio: torch.Tensor, lens: torch.Tensor | None, words: str) -> None:
    with pytest.raises((ShapeError, InputError), match=words):
        build()(audio, torch.zeros(3, 4).long(), lens)
