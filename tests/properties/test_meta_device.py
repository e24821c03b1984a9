"""The meta device: a model that is made there and gets its memory and weights later is the model that was saved."""

import copy
from collections.abc import Callable

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, one_of_each, tokens
from kinds import KINDS, Kind
from torch import nn

from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

EVERY = pytest.mark.parametrize(("stack", "case"), cases("decoder"), ids=name_of)
FIRSTS = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross"), ids=name_of)

STACK = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
ROTATED = [{"rotary_pos_emb": True}, {"rotary_xpos": True}, {"polar_pos_emb": True}, {"alibi_pos_bias": True}]


def materialized(make: Callable[[], nn.Module], saved: nn.Module, *, assign: bool) -> nn.Module:
    """Return a model that is made on the meta device, gets memory that nobody wrote, and then the saved weights.

    Args:
        make: builds the model.
        saved: has the weights.
        assign: it gets no memory, but the tensors of the state dict themselves.
    """
    with torch.device("meta"):
        model = make()
    assert any(t.is_meta for t in model.parameters())
    if not assign:
        # deterministic mode fills it with NaN
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    return model.eval()


def equal(one: nn.Module, two: nn.Module) -> None:
    """Assert that two models have equal tensors, also those that are in no state dict."""
    theirs = dict(two.named_buffers())
    for name, buffer in one.named_buffers():
        assert buffer.dtype == theirs[name].dtype
        assert torch.equal(buffer, theirs[name]), name


@EVERY
@torch.no_grad()
def test_a_model_from_the_meta_device_equals_the_saved_one(stack: str, case: Case) -> None:
    check(stack, case, assign=False)


@FIRSTS
@torch.no_grad()
def test_assigned_weights(stack: str, case: Case) -> None:
    check(stack, case, assign=True)


def check(stack: str, case: Case, *, assign: bool) -> None:
    saved, ids = case.build(stack), tokens(2, 6)
    model = materialized(lambda: case.build(stack), saved, assign=assign)
    equal(model, saved)
    assert torch.equal(call(model, ids), call(saved, ids))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_other_models(kind: Kind, assign: bool) -> None:
    options = {"scaled_sinu_pos_emb": True} if kind.name in ("continuous", "xval") else {}

    def make() -> nn.Module:
        return kind.build(layers={"rotary_pos_emb": True}, **options)

    saved, inputs = make(), kind.draw(2, 5)
    assert torch.equal(kind.run(materialized(make, saved, assign=assign), inputs), kind.run(saved, inputs))


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_models_of_two_stacks_and_of_pictures(assign: bool) -> None:
    def translator() -> nn.Module:
        stacks = {"enc_rotary_pos_emb": True, "dec_rotary_pos_emb": True, "enc_max_seq_len": 8, "dec_max_seq_len": 8}
        sizes = {"enc_num_tokens": 9, "enc_depth": 1, "enc_heads": 2, "dec_num_tokens": 9, "dec_depth": 1}
        return XTransformer(dim=16, dec_heads=2, tie_token_emb=True, **sizes, **stacks)

    def vision() -> nn.Module:
        return ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=Encoder(**STACK, rotary_pos_emb=True))

    ids, pictures = torch.randint(0, 9, (2, 5)), torch.randn(2, 3, 8, 8)
    for make, run in (
        (translator, lambda model: model.decoder.net(ids, context=model.encoder(ids, return_embeddings=True))),
        (vision, lambda model: model(pictures)),
    ):
        saved = make().eval()
        assert torch.equal(run(materialized(make, saved, assign=assign)), run(saved))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [*ROTATED, {"scaled_sinu_pos_emb": True}], ids=lambda options: next(iter(options)))
def test_frequencies_do_not_depend_on_the_default_dtype(options: dict[str, bool], dtype: torch.dtype) -> None:
    usual = BASE.build(**options)
    torch.set_default_dtype(dtype)
    try:
        other = BASE.build(**options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(other.parameters()).dtype == dtype
    equal(other, usual)
    # and there is something to compare
    assert list(usual.buffers())


@pytest.mark.parametrize("options", ROTATED, ids=lambda options: next(iter(options)))
@torch.no_grad()
def test_memory_that_is_taken_away_again(options: dict[str, bool]) -> None:
    """`to_empty` of a model with weights, a way to the meta device and back, and half precision keep all."""
    model, usual = BASE.build(**options), BASE.build(**options)
    equal(model.to_empty(device="cpu"), usual)
    equal(model.to("meta").to_empty(device="cpu"), usual)
    equal(model.bfloat16(), usual)
    weights = {name: t.bfloat16() for name, t in usual.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32
        close(buffer, dict(usual.named_buffers())[name], 1e-2)


@torch.no_grad()
def test_a_users_module_around_ours() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**STACK, rotary_xpos=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    saved, ids = Own().eval(), torch.randint(0, 9, (1, 5))
    for assign in (False, True):
        assert torch.equal(materialized(Own, saved, assign=assign)(ids), saved(ids))
