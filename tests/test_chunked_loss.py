"""The loss in chunks of tokens: the same numbers and gradients, and never the logits of more than a chunk."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, VOCABULARY, close, perturb, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, TokenRangeError
from x_transformers.models import chunked_loss
from x_transformers.models.chunked_loss import linear_losses

HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "tied": {"tie_embedding": True},
    "mixture": {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
    "sigsoftmax": {"sigsoftmax_logits": True},
    "wide": {"logits_dim": 2 * VOCABULARY},
    "given": {"to_logits": nn.Linear(16, VOCABULARY)},
    "next_embedding": {"add_continuous_pred_head": True},
    "memory": {"num_memory_tokens": 3, "attn_dropout": 0.2},
}


def wrapped(chunk: int | None, **options: Any) -> AutoregressiveWrapper:
    wrapper = {name: options.pop(name) for name in ("add_attn_z_loss", "ignore_index") if name in options}
    return AutoregressiveWrapper(BASE.build(**options), loss_chunk_size=chunk, **wrapper).train()


def loss_and_gradients(model: AutoregressiveWrapper, x: Tensor, **given: Any) -> list[Tensor | None]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(x, **given)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same(model: AutoregressiveWrapper, run: Callable[[], list[Tensor | None]], *chunks: int) -> None:
    model.loss_chunk_size = None
    whole = run()
    for chunk in chunks:
        model.loss_chunk_size = chunk
        for got, wanted in zip(run(), whole, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None and wanted is not None:
                close(got, wanted)


@pytest.mark.parametrize("name", HEADS)
def test_numbers_are_the_same(name: str) -> None:
    """Chunks that divide the tokens, that do not, single tokens, and one chunk for all."""
    model = wrapped(None, **HEADS[name])
    x = tokens(2, 9)
    same(model, lambda: loss_and_gradients(model, x), 1, 6, 7, 100)


def test_what_surrounds_the_loss() -> None:
    """Ignored labels, short rows, prepended embeddings, hidden keys, and attention's own loss."""
    model = wrapped(None, add_attn_z_loss=True, ignore_index=-5)
    model.mask_prob = 0.3
    x, lens, embeds = tokens(3, 8), torch.tensor([8, 5, 1]), torch.randn(3, 2, 16)
    x[0, 3:5] = -5
    same(model, lambda: loss_and_gradients(model, x, lens=lens, prepend_embeds=embeds), 4)
    same(model, lambda: loss_and_gradients(model, x[:, :2]), 4)


def test_with_blocks_that_run_again() -> None:
    model = wrapped(None, checkpoint_every=1, attn_dropout=0.2)
    x = tokens(2, 8)
    same(model, lambda: loss_and_gradients(model, x), 5)


def test_low_precision() -> None:
    """Gradients of many chunks add up in float32, so that their sum is as close to the truth as that of one chunk."""
    model, x = wrapped(None), tokens(8, 32)
    true = loss_and_gradients(model, x)[-1]
    errors = []
    for chunk in (None, 1):
        model.loss_chunk_size = chunk
        with torch.autocast("cpu", torch.bfloat16):
            got = loss_and_gradients(model, x)[-1]
        errors.append(((got - true).norm() / true.norm()).item())
    assert 0 < errors[1] < 1.5 * errors[0] < 0.02

    model = model.bfloat16()
    model.loss_chunk_size = 5
    assert model(x).dtype == torch.float32


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements, and how often one has as many."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.most = max(self.most, each.numel())
        return out


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_never_whole(training: bool) -> None:
    vocabulary, chunk, n = 4096, 4, 64
    decoder = Decoder(dim=8, depth=1, heads=1, attn_dim_head=8, verbose=False)
    net = TransformerWrapper(num_tokens=vocabulary, max_seq_len=n, attn_layers=decoder)
    most = []
    for size in (None, chunk):
        model = AutoregressiveWrapper(net, loss_chunk_size=size)
        with Largest() as largest, torch.set_grad_enabled(training):
            loss = model(torch.randint(0, vocabulary, (1, n)))
            if training:
                loss.backward()
        most.append(largest.most)
    assert most == [n * vocabulary, max(chunk, 8) * vocabulary]  # the head itself is 8 wide


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", ["linear", "tied", "mixture", "sigsoftmax", "given"])
def test_graphs_compute_the_same(name: str) -> None:
    model = perturb(wrapped(5, depth=1, **HEADS[name]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens(2, 9)
    x[0, 2:4] = -100
    whole = loss_and_gradients(model, x)
    model.zero_grad()
    compiled(x).backward()
    for got, wanted in zip([p.grad for p in model.parameters()], whole[1:], strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            close(got, wanted)
    with torch.no_grad():
        close(compiled(x), whole[0])


@pytest.mark.usefixtures("_fresh")
def test_autocast_in_graphs() -> None:
    model, x = wrapped(5, depth=1), tokens(8, 32)
    true = loss_and_gradients(model, x)[-1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    errors = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(x)
        loss.backward()
        grad = list(model.parameters())[-1].grad
        assert grad is not None
        assert grad.dtype is torch.float32
        errors.append(((grad - true).norm() / true.norm()).item())
    assert 0 < errors[1] < 1.1 * errors[0] < 0.02


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("learns", [True, False])
def test_heads_that_must_be_called(learns: bool) -> None:
    """A head with a hook is called in a graph too; one that does not learn gets no gradient."""
    model = wrapped(5, depth=1)
    model.net.to_logits.weight.requires_grad_(learns)
    if learns:
        model.net.to_logits.register_forward_hook(lambda _, args, out: 2 * out)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), tokens(2, 9)
    wanted = loss_and_gradients(model, x)
    model.zero_grad()
    loss = compiled(x)
    loss.backward()
    close(loss, wanted[0])
    assert (model.net.to_logits.weight.grad is None) != learns


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator(bias: bool, sigmoid: bool) -> None:
    """Its backward pass by finite differences, and PyTorch's own checks of operators."""
    x, weight, shift = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((7, 4), (11, 4), (11,))
    )
    labels = torch.randint(0, 11, (7,))
    labels[2] = -100
    given = (x, weight, shift) if bias else (x, weight)
    options = (1.0 if bias else 0.7, sigmoid, -100, 3, None)

    def losses(x: Tensor, weight: Tensor, shift: Tensor | None = None, labels: Tensor = labels) -> Tensor:
        return linear_losses(x, labels, weight, shift, *options)

    assert torch.autograd.gradcheck(losses, given)
    torch.library.opcheck(linear_losses, (x, labels, weight, shift if bias else None, *options))
    assert losses(x[:0], weight, labels=labels[:0]).shape == (0,)
    with pytest.raises(TokenRangeError, match="targets run up to 11"):
        losses(*given, labels=torch.full((7,), 11))


def test_the_operator_never_has_more_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, logits = [], chunked_loss._logits

    def counted(head: chunked_loss.LinearHead, features: Tensor) -> Tensor:
        rows.append(features.shape[0])
        return logits(head, features)

    monkeypatch.setattr(chunked_loss, "_logits", counted)
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(11, 4)
    linear_losses(x, torch.randint(0, 11, (10,)), weight, None, 1.0, False, -100, 4, None).sum().backward()
    assert rows == 2 * [4, 4, 2]


def test_its_configuration_rebuilds_it() -> None:
    model = wrapped(5)
    assert type(model).from_config(model.config).loss_chunk_size == 5


class Mixing(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.cumsum(dim=1)


def test_refused() -> None:
    for chunk in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="loss_chunk_size"):
            wrapped(chunk)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Mixing, which may read several tokens"):
        wrapped(4, to_logits=Mixing())
    with pytest.raises(InputError, match="return_outputs"):
        wrapped(4)(tokens(1, 4), return_outputs=True)
    with pytest.raises(TokenRangeError, match="targets run up to"):
        wrapped(4, logits_dim=VOCABULARY // 2)(torch.full((1, 4), VOCABULARY - 1))
