"""Models inside of what PyTorch puts around them: compiled, distributed, checkpointed. Objectives take them as they
take the model itself, train what was given, and generate with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    ViTransformerWrapper,
    XLAutoregressiveWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.errors import ConfigError, InputError
from x_transformers.modules.unwrap import unwrapped

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch, of inputs of a graph

VOCABULARY, LENGTH = 12, 8
STACK = {"dim": 16, "depth": 1, "heads": 2, "verbose": False}


def decoder(**more: Any) -> TransformerWrapper:
    layers = Decoder(**STACK, ff_dropout=0.3)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, max_mem_len=4, attn_layers=layers, **more)


def encoder() -> TransformerWrapper:
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=Encoder(**STACK))


def vectors() -> ContinuousTransformerWrapper:
    return ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=LENGTH, attn_layers=Decoder(**STACK))


def numbers() -> XValTransformerWrapper:
    layers = Decoder(**STACK)
    return XValTransformerWrapper(num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=LENGTH, attn_layers=layers)


def ids(n: int = LENGTH) -> Tensor:
    return torch.arange(2 * n).reshape(2, n) % VOCABULARY


@dataclass(frozen=True)
class Objective:
    """An objective, with a model for it.

    Attributes:
        net: builds the model.
        wrap: builds the objective around it.
        loss: of one batch.
        generate: new tokens; None for an objective that generates nothing.
    """

    net: Callable[[], nn.Module]
    wrap: Callable[[Any], nn.Module]
    loss: Callable[[Any], Tensor] = lambda model: model(ids())
    generate: Callable[[Any], Tensor] | None = None


OBJECTIVES = {
    "next token": Objective(decoder, AutoregressiveWrapper, generate=lambda model: model.generate(ids(3), 4)),
    "in chunks": Objective(
        decoder,
        lambda net: AutoregressiveWrapper(net, loss_chunk_size=3, mask_prob=0.2),
        generate=lambda model: model.beam_search(ids(3), 4),
    ),
    "segments": Objective(decoder, XLAutoregressiveWrapper, generate=lambda model: model.generate(ids(3), 9)),
    "masked": Objective(
        encoder,
        lambda net: NonAutoregressiveWrapper(net, mask_id=0, steps=3, self_cond=True, self_token_critic=True),
        loss=lambda model: model(ids()).loss,
        generate=lambda model: model.generate(2),
    ),
    "belief states": Objective(
        decoder, BeliefStateWrapper, generate=lambda model: model.generate_with_suffix_cond(ids(3), 4)
    ),
    "preferences": Objective(
        decoder, DPO, lambda model: model(ids(), ids().flip(1), prompt_mask=torch.arange(LENGTH).expand(2, -1) < 2)
    ),
    "vectors": Objective(
        vectors,
        ContinuousAutoregressiveWrapper,
        lambda model: model(torch.ones(2, LENGTH, 3)) + model(torch.ones(2, LENGTH, 3), rollout_steps=2),
        lambda model: model.generate(torch.ones(2, 3, 3), 4),
    ),
    "numbers": Objective(
        numbers,
        XValAutoregressiveWrapper,
        lambda model: model(ids(), torch.ones(2, LENGTH)),
        lambda model: model.generate(ids(3), torch.ones(2, 3), 4).sampled_token_ids,
    ),
}


def wrapped_only(module: nn.Module) -> nn.Module:
    """What `torch.compile` returns, without the seconds that its graphs take."""
    return torch.compile(module, disable=True)  # type: ignore[return-value]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


AROUND = {
    "compiled": wrapped_only,
    "distributed": DistributedDataParallel,
    "checkpointed": checkpoint_wrapper,
    "compiled and distributed": lambda module: DistributedDataParallel(wrapped_only(module)),
}


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(objective: Objective, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss in training mode, and all gradients by the names that they have in the plain model."""
    torch.manual_seed(1)
    model.train().zero_grad()
    loss = objective.loss(model)
    loss.backward()
    named = {plain(name): parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), named


def plain(name: str) -> str:
    for around in (
        "_orig_mod.",
        "_checkpoint_wrapped_module.",
        "net.module.",
        "decoder.module.",
        "policy_model.module.",
    ):
        name = name.replace(around, around.partition(".")[0] + "." if around.count(".") > 1 else "")
    return name


def check(objective: Objective, model: nn.Module, wanted: nn.Module) -> None:
    """Both have the same loss, gradients and results; generation runs none of the modules that `model` trains."""
    loss, gradients = trained(objective, model)
    expected, expected_gradients = trained(objective, wanted)
    close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name])
    if objective.generate is None:
        return
    seen: list[bool] = []
    for part in model.modules():
        part.train = lambda mode=True, part=part: seen.append(mode) or part  # type: ignore[method-assign]
    torch.manual_seed(2)
    new = objective.generate(model)
    torch.manual_seed(2)
    assert torch.equal(new, objective.generate(wanted))
    assert not seen, "generation changed the modes of modules that train"


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:.*requires_grad.*")
def test_objectives_take_models_with_something_around_them(name: str, around: str) -> None:
    objective = OBJECTIVES[name]
    net = perturb(objective.net())
    torch.manual_seed(0)
    wanted = objective.wrap(copy.deepcopy(net))
    torch.manual_seed(0)
    model = objective.wrap(AROUND[around](net))
    assert model.config == wanted.config
    check(objective, model, wanted)


@pytest.mark.parametrize("around", [compiled, compiled_in_place])
def test_graphs_are_those_of_the_model(around: Callable[[nn.Module], nn.Module]) -> None:
    objective = OBJECTIVES["next token"]
    net = perturb(objective.net())
    wanted = objective.wrap(copy.deepcopy(net))
    check(objective, objective.wrap(around(net)), wanted)


@pytest.mark.parametrize("name", ["next token", "segments", "masked"])
@pytest.mark.parametrize("around", ["compiled", "distributed"])
def test_something_may_be_put_around_a_model_later(name: str, around: str) -> None:
    objective = OBJECTIVES[name]
    torch.manual_seed(0)
    model = objective.wrap(perturb(objective.net()))
    wanted = copy.deepcopy(model)
    inner = AROUND[around](model.net)
    if isinstance(getattr(model, "token_critic", None), nn.Module):
        model.token_critic.net = inner
    model.net = inner
    check(objective, model, wanted)


@pytest.mark.parametrize("around", AROUND)
def test_helpers_of_generation_are_looked_into(around: str) -> None:
    model, prompt = AutoregressiveWrapper(perturb(decoder())), ids(3)
    helper = perturb(decoder())

    def outputs(helper: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        drafted = model.generate(prompt, 4, draft_model=helper)
        return [drafted, model.generate(prompt, 4, temperature=0.0, amateur_model=helper)]

    wanted = [outputs(helper), outputs(AutoregressiveWrapper(helper))]
    got = [outputs(AROUND[around](copy.deepcopy(helper)))]
    got.append(outputs(AROUND[around](AutoregressiveWrapper(AROUND[around](copy.deepcopy(helper))))))
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("around", ["compiled", "checkpointed"])
def test_models_take_stacks_with_something_around_them(around: str) -> None:
    stack = perturb(Decoder(**STACK))
    build = lambda stack: TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=stack)  # noqa: E731
    torch.manual_seed(0)
    wanted = build(copy.deepcopy(stack))
    torch.manual_seed(0)
    net = build(AROUND[around](stack))
    close(net(ids()), wanted(ids()))
    model, other = AutoregressiveWrapper(net), AutoregressiveWrapper(wanted)
    assert torch.equal(model.generate(ids(3), 4, temperature=0.0), other.generate(ids(3), 4, temperature=0.0))
    vit = {"image_size": 4, "patch_size": 2, "num_classes": 3}
    assert ViTransformerWrapper(**vit, attn_layers=AROUND[around](Encoder(**STACK)))(torch.ones(1, 3, 4, 4)).shape == (
        1,
        3,
    )


@pytest.mark.parametrize("around", AROUND)
def test_refusals_name_what_is_inside(around: str) -> None:
    other = AROUND[around](nn.Linear(2, 2))
    for wrap in (AutoregressiveWrapper, XLAutoregressiveWrapper, DPO, BeliefStateWrapper):
        with pytest.raises(ConfigError, match=r"is a Linear; it must be a TransformerWrapper"):
            wrap(other)
    with pytest.raises(InputError, match="`draft_model` is a Linear"):
        AutoregressiveWrapper(decoder()).generate(ids(3), 2, draft_model=other)


def test_what_is_inside() -> None:
    net = nn.Linear(2, 2)
    assert unwrapped(net) is net
    assert unwrapped(checkpoint_wrapper(wrapped_only(net))) is net
    assert unwrapped(nn.Sequential(net)) is not net
    assert unwrapped("net") == "net"
