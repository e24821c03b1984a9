"""Kernels and memory traffic per layer, counted without a GPU: `python -m benchmarks.kernels [FEATURE ...]`.

On a GPU, eager mode pays for each operation that is not a view (a kernel is launched) and for each byte that it reads
or writes. Both are counted here on a CPU, forward and backward, with a `TorchDispatchMode`:

    kernels = K(2 layers) - K(1 layer)
    traffic = (T(2 layers) - T(1 layer) at 2 rows) - (the same at 1 row)

so that embeddings, the head and the loss cancel, and in the traffic the weights as well, which a large batch shares.
Traffic is relative to the size of one activation `(n, D)`. RMSNorm (`torch.nn.functional.rms_norm`) and attention
(SDPA) are one operation forward and one backward, as on a GPU. Where a GPU would use FlexAttention, the count is that
of the backend that serves short rows on a CPU.

The features are the catalog of stacks, by their first example, as differences to the same model without the feature.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bare import BareGPT, Shape
from benchmarks.bare_llama import BareLlama
from benchmarks.configurations import DIM, HEADS, VOCABULARY, build, configuration
from benchmarks.configurations import FEATURES as MEASURED
from benchmarks.contestants import gpt2, llama, next_token_loss, of_hugging_face, our_gpt, our_llama
from benchmarks.settings import Settings
from x_transformers import TransformerWrapper
from x_transformers.layers.catalog import FEATURES
from x_transformers.losses import token_losses
from x_transformers.ops import FUSED_RMS_NORM

LENGTH = 128
"""Tokens of a row. A head has 32 features, so scores of all heads take four activations."""

FREE = frozenset(
    {
        "detach",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "_reshape_alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    }
)
"""Operations that launch no kernel, besides views."""

BY_DEPTH: dict[str, Callable[[int], dict[str, Any]]] = {
    "execute_order": lambda depth: {"layers_execute_order": tuple(range(2 * depth))},
    "custom_layers": lambda depth: {"custom_layers": ("a", "f") * depth, "depth": None},
}
"""Keywords of features that name each layer."""

IN_PAIRS = frozenset({"depth_routing", "parallel_blocks", "unet_skips"})
"""Features that need an even number of blocks; counted over two more blocks, and halved."""


class Count(NamedTuple):
    """Kernels of a layer, and their traffic in activations."""

    kernels: float
    traffic: float

    def __sub__(self, other: Count) -> Count:
        return Count(self.kernels - other.kernels, self.traffic - other.traffic)


class Counter(TorchDispatchMode):
    """Counts operations that are not views, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.bytes = 0
        self._fused = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        if not self._fused and not is_free(operation):
            self._add(args, kwargs, out)
        return out

    @contextmanager
    def as_one(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Count everything within as one operation, which reads `tensors` and writes what the list will hold."""
        outputs: list[Tensor] = []
        self._fused = True
        try:
            yield outputs
        finally:
            self._fused = False
        self._add(tensors, outputs)

    def _add(self, *tensors: Any) -> None:
        self.kernels += 1
        self.bytes += sum(each.nbytes for each in tree_leaves(tensors) if isinstance(each, Tensor))


def is_free(operation: Any) -> bool:
    """Return True for views, allocations, and questions about a tensor."""
    if not isinstance(operation, torch._ops.OpOverload) or operation.namespace == "prim":
        return True
    return operation.is_view or operation._schema.name.removeprefix("aten::") in FREE


class FusesRMSNorm(TorchFunctionMode):
    """Lets a counter see each RMSNorm as one operation; a CPU would compose it of ten."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.nn.functional.rms_norm, torch.rms_norm):
            return _rms_norm(self._counter, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _rms_norm(
    counter: Counter, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _FusedRMSNorm.apply(
        input, weight, partial(torch.rms_norm, normalized_shape=normalized_shape, eps=eps), counter
    )


class _FusedRMSNorm(torch.autograd.Function):
    """RMSNorm whose forward pass writes the output and the factor of each row, and whose backward pass reads both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, norm: Callable[..., Tensor], counter: Counter) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.counter = norm, counter
        with counter.as_one(x, *(() if weight is None else (weight,))) as outputs:
            out = norm(x, weight=weight)
            outputs += [out, out[..., 0]]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        leaves = [each.detach().requires_grad_() for each in (x, weight) if each is not None]
        with ctx.counter.as_one(grad, grad[..., 0], *leaves) as outputs, torch.enable_grad():
            outputs += torch.autograd.grad(
                ctx.norm(leaves[0], weight=None if weight is None else leaves[1]), leaves, grad
            )
        return outputs[0], None if weight is None else outputs[1], None, None


def count(make: Callable[[int], nn.Module], loss: Callable[[nn.Module, Tensor], Tensor], pairs: bool = False) -> Count:
    """Count a layer of the models that `make` builds for a number of layers.

    Args:
        make: number of layers to model.
        loss: model and tokens `(b, n)` to a scalar.
        pairs: compare 4 with 2 layers, instead of 2 with 1.
    """
    more, fewer = (4, 2) if pairs else (2, 1)
    models = {layers: make(layers) for layers in (fewer, more)}
    found = {(layers, rows): _pass(models[layers], loss, rows) for layers in models for rows in (1, 2)}
    kernels = found[more, 1].kernels - found[fewer, 1].kernels
    by_rows = [found[more, rows].bytes - found[fewer, rows].bytes for rows in (1, 2)]
    activation = LENGTH * DIM * torch.get_default_dtype().itemsize
    return Count(kernels / (more - fewer), (by_rows[1] - by_rows[0]) / activation / (more - fewer))


def _pass(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], rows: int) -> Counter:
    """Count one forward and backward pass. Gradients are returned, not accumulated."""
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH))
    parameters = [each for each in model.parameters() if each.requires_grad]
    with _counting(), Counter() as counter, FusesRMSNorm(counter):
        torch.autograd.grad(loss(model, ids), parameters, allow_unused=True)
    return counter


@contextmanager
def _counting() -> Iterator[None]:
    """Use one thread, since models are small, no deterministic kernels, which consist of several operations, and
    RMSNorms wherever a GPU would.
    """
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fused = set(FUSED_RMS_NORM)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    FUSED_RMS_NORM.add("cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        FUSED_RMS_NORM.intersection_update(fused)


# the models


def shape(layers: int) -> Shape:
    return Shape(vocab=VOCABULARY, context=LENGTH, layers=layers, heads=HEADS, dim=DIM)


def _call(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)


def _hugging_face(model: nn.Module, ids: Tensor) -> Tensor:
    return of_hugging_face(model).loss(ids)


MODELS: dict[str, tuple[Callable[[Shape], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "bare": (BareGPT, next_token_loss),
    "ours": (our_gpt, _call),
    "GPT-2": (gpt2, _hugging_face),
    "bare Llama": (BareLlama, next_token_loss),
    "our Llama": (our_llama, _call),
    "Llama": (llama, _hugging_face),
}
HUGGING_FACE = frozenset({"GPT-2", "Llama"})


def model_names() -> list[str]:
    """Return those that can be built here."""
    return [name for name in MODELS if name not in HUGGING_FACE or find_spec("transformers") is not None]


def count_model(name: str) -> Count:
    """Count a layer of a whole model."""
    make, loss = MODELS[name]
    return count(lambda layers: make(shape(layers)), loss)


# the features


def feature_names() -> list[str]:
    """Return the features of stacks that have an example, in the order of the catalog, without those of mixers."""
    return [feature.name for feature in FEATURES if feature.examples and feature.name in MEASURED]


def count_feature(name: str) -> Count:
    """Count what a feature adds to a layer."""
    case = configuration(name)
    without = _without(tuple(sorted(case.lacking.items())), case.causal, name in IN_PAIRS)
    return _counted(case.having, case.causal, BY_DEPTH.get(name), name in IN_PAIRS) - without


@cache
def _without(keywords: tuple[tuple[str, Any], ...], causal: bool, pairs: bool) -> Count:
    return _counted(dict(keywords), causal, None, pairs)


def _counted(
    keywords: Mapping[str, Any], causal: bool, by_depth: Callable[[int], dict[str, Any]] | None, pairs: bool
) -> Count:
    def make(layers: int) -> nn.Module:
        return build(
            {**keywords, "depth": layers, "max_seq_len": LENGTH, **(by_depth(layers) if by_depth else {})}, causal
        )

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        # of the same tokens, which every stack may see; what is not part of a layer does not count
        return token_losses(model.net(ids, **_arguments(model.net, len(ids))), ids).mean()

    return count(make, loss, pairs)


def _arguments(model: TransformerWrapper, rows: int) -> dict[str, Tensor]:
    """Return what a pass needs besides tokens: a context, a condition."""
    layers, needed = model.attn_layers, {}
    for branch in layers.branches("c"):
        needed["context"] = torch.randn(rows, LENGTH, branch.attention.dim_context)
    if layers.need_condition:
        needed["condition"] = torch.randn(rows, layers.dim_condition)
    return needed


# the section, and the table


def kernels(settings: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield kernels and traffic per layer: of the models, and of the plain decoder with each feature."""
    models = {name: count_model(name) for name in model_names()}
    yield "operations", {name: each.kernels for name, each in models.items()}
    yield "traffic", {name: each.traffic for name, each in models.items()}
    plain = _without((), True, False)
    features = {name: count_feature(name) for name in feature_names()}
    yield (
        "operations by feature",
        {"plain": plain.kernels, **{n: plain.kernels + c.kernels for n, c in features.items()}},
    )
    yield "traffic by feature", {"plain": plain.traffic, **{n: plain.traffic + c.traffic for n, c in features.items()}}


def lines(names: Iterable[str], counted: Callable[[str], Count], sign: str = "") -> Iterator[str]:
    """Yield a line for each name as soon as it is counted."""
    for name in names:
        found = counted(name)
        yield f"{name:<30} {found.kernels:{sign}9,.0f} {found.traffic:{sign}9,.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", metavar="FEATURE", help="of the catalog of stacks; default all")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.features) - set(feature_names()))
    if unknown:
        parser.error(f"there is no feature {', '.join(unknown)}; there are {', '.join(feature_names())}.")
    torch.manual_seed(0)
    print(f"{'per layer':<30} {'kernels':>9} {'traffic':>9}")
    for line in lines(model_names(), count_model):
        print(line, flush=True)
    print(f"\n{'added by a feature':<30} {'kernels':>9} {'traffic':>9}")
    for line in lines(options.features or feature_names(), count_feature, "+"):
        print(line, flush=True)


if __name__ == "__main__":
    main()
