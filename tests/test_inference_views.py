"""Views for inference: the same numbers as the plain net, and nothing of them in the user's modules."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import Case, cases, close, name_of, other_inputs, tokens
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.attention.projections import Projections
from x_transformers.errors import ShapeError
from x_transformers.models.embeddings import AbsolutePositionalEmbedding
from x_transformers.modules.inference import (
    COPIED_BYTES,
    InferenceView,
    PreparesForInference,
    evaluating,
    plain_map,
)
from x_transformers.modules.norms import GainNorm


def build(**options) -> TransformerWrapper:
    torch.manual_seed(0)
    stack = Decoder(dim=24, depth=2, heads=4, attn_dim_head=8, verbose=False, **options)
    net = TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=stack).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def projections(net: nn.Module) -> list[Projections]:
    return [part for part in net.modules() if isinstance(part, Projections)]


# the same numbers


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
@torch.no_grad()
def test_a_view_computes_what_the_net_computes(stack: str, case: Case) -> None:
    net, ids = case.build(stack), tokens(2, 9)
    given = other_inputs(net, ids)
    expected = net(ids, **given)
    view = InferenceView(net.train())
    with view:
        assert not any(part.training for part in view.of(net).modules())
        close(view.of(net)(ids, **given), expected)


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_nothing_in_a_view_leads_back_to_the_net(stack: str, case: Case) -> None:
    net = case.build(stack)
    view = InferenceView(net)
    replaced = {id(part): name for name, part in net.named_modules() if view.of(part) is not part}
    for name, part in view.of(net).named_modules():
        for attribute, value in vars(part).items():
            for found in modules_in(value):
                assert id(found) not in replaced, f"{name}.{attribute} still holds {replaced[id(found)]}"
    assert [*view.of(net).state_dict()] == [*net.state_dict()]
    for mine, own in zip(view.of(net).parameters(), net.parameters(), strict=True):
        assert mine is own


def modules_in(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Every module that a value holds, in whatever way."""
    if depth > 6 or isinstance(value, (Tensor, type)):
        return
    if isinstance(value, nn.Module):
        yield value
        return
    held: Any = ()
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        held = value
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        held = (value.__self__,)
    elif isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
    elif hasattr(value, "__dict__"):
        held = vars(value).values()
    for each in held:
        yield from modules_in(each, depth + 1)


@torch.inference_mode()
def test_the_packed_matrix_is_what_is_read() -> None:
    net, x = build(), torch.randint(0, 20, (1, 5))
    view = InferenceView(net)
    own = view.of(net)
    with view:
        before = own(x)
        for part in projections(own):
            part.ready.weight.zero_()
        assert not torch.allclose(own(x), before)
        close(net(x), before)


@torch.inference_mode()
def test_biases_are_packed_too() -> None:
    part = Projections(dim=4, dim_context=4, heads=4, kv_heads=2, key_heads=2, dim_head=2, value_dim_head=2, bias=True)
    x, packed = torch.randn(1, 3, 4), part.prepare()
    assert packed is not None
    close(F.linear(x, *packed), torch.cat((part.q(x), part.k(x), part.v(x)), dim=-1))
    part.k = nn.Linear(4, 4, bias=False)  # a user's own map
    assert part.prepare() is None


def test_nothing_is_left_in_the_net() -> None:
    net = build()
    names, attributes = set(net.state_dict()), [dict(vars(part)) for part in net.modules()]
    view = InferenceView(net)

    def fail() -> None:
        with view:
            own = view.of(net)
            assert set(own.state_dict()) == names
            assert all(part.ready is not None for part in own.modules() if isinstance(part, GainNorm))
            assert [dict(vars(part)) for part in net.modules()] == attributes
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [dict(vars(part)) for part in net.modules()] == attributes
    assert all(part.ready is None for part in net.modules() if isinstance(part, PreparesForInference))


def test_children_and_parameters_are_ordinary_attributes() -> None:
    net = build()
    own = InferenceView(net).of(net)
    assert vars(own)["attn_layers"] is own._modules["attn_layers"]
    assert vars(own.to_logits)["weight"] is net.to_logits.weight
    assert "weight" not in vars(InferenceView(net, direct=False).of(net).to_logits)


def test_a_module_reached_twice_has_one_view() -> None:
    linear = nn.Linear(3, 3)
    net = nn.Sequential(linear, nn.ReLU(), linear)
    own = InferenceView(net).of(net)
    assert own[0] is own[2]
    assert own[0] is not linear
    assert own[0].weight is linear.weight


def test_an_earlier_view_is_brought_up_to_date() -> None:
    net = build()
    first = InferenceView(net)
    old = first.of(net)
    with first:
        pass
    net.to_logits = nn.Linear(24, 7)
    del net.attn_layers.final_norm
    net.attn_layers.final_norm = None
    again = InferenceView(net, earlier=first)
    assert again.of(net) is old
    assert old.to_logits is not net.to_logits
    assert old.to_logits.weight is net.to_logits.weight
    assert old.attn_layers.final_norm is None
    with torch.no_grad(), again:
        close(old(torch.zeros(1, 3).long()), net(torch.zeros(1, 3).long()))


# modules that are used as they are


class Remembers(nn.Linear):
    """A user's module, which keeps something of each call."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[1]
        self.was_training = self.training
        return super().forward(x)


def test_a_users_module_is_used_as_it_is() -> None:
    net = build()
    net.to_logits = Remembers(24, 20, bias=False)
    model = AutoregressiveWrapper(net).train()
    model.generate(torch.randint(0, 20, (1, 4)), 3)
    assert net.to_logits.seen == 1
    assert not net.to_logits.was_training
    assert net.to_logits.training


def test_users_modules_are_in_evaluation_mode_while_anybody_needs_it() -> None:
    net = build()
    net.to_logits = Remembers(24, 20, bias=False)
    model = AutoregressiveWrapper(net).train()
    first, second = (model.stream(torch.randint(0, 20, (1, 4)), 3) for _ in range(2))
    next(first)
    next(second)
    first.close()
    assert not net.to_logits.training
    list(second)
    assert net.to_logits.training


def test_overlapping_contexts_restore_modes() -> None:
    one, other = nn.Dropout(), nn.Dropout().eval()
    first, second = evaluating(one, other), evaluating(one)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not one.training
    second.__exit__(None, None, None)
    assert one.training
    assert not other.training


# copies, pickles, threads and forks meanwhile


def waiting(model: AutoregressiveWrapper) -> tuple[threading.Thread, threading.Event]:
    """A thread that generates, and waits in the middle of it until the event is set."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(logits: Tensor) -> Tensor:
        inside.set()
        go_on.wait(30)
        return logits

    prompt = torch.zeros(1, 4, dtype=torch.long)
    thread = threading.Thread(target=model.generate, args=(prompt, 3), kwargs={"filter_logits_fn": wait})
    thread.start()
    assert inside.wait(30)
    return thread, go_on


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_duplicates_made_while_generating_are_clean(duplicate: Callable[[Any], Any]) -> None:
    model, x = AutoregressiveWrapper(build(attn_qk_rmsnorm=True)).train(), torch.randint(0, 20, (2, 5))
    thread, go_on = waiting(model)
    own = duplicate(model)
    go_on.set()
    thread.join()
    assert all(part.training for part in own.modules())
    assert not any("ready" in vars(part) for part in own.modules())
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.load_state_dict(own.state_dict())
        close(own.eval().net(x), model.eval().net(x))


def test_a_thread_trains_while_another_generates() -> None:
    model, x = AutoregressiveWrapper(build(ff_dropout=0.5)).train(), torch.randint(0, 20, (2, 6))
    thread, go_on = waiting(model)
    assert all(part.training for part in model.modules())
    loss = model(x)
    loss.backward()
    go_on.set()
    thread.join()
    assert all(parameter.grad is not None for parameter in model.net.attn_layers.layers.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_made_while_generating_keeps_no_modes_of_other_threads() -> None:
    net = build()
    net.to_logits = Remembers(24, 20, bias=False)
    model = AutoregressiveWrapper(net).train()
    thread, go_on = waiting(model)
    assert not net.to_logits.training
    if (child := os.fork()) == 0:
        signal.alarm(20)
        os._exit(0 if net.to_logits.training and torch.backends.mkldnn.enabled else 1)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert net.to_logits.training


# parts that are prepared


@pytest.mark.parametrize("l2norm_embed", [False, True])
@torch.no_grad()
def test_tables_of_positions(l2norm_embed):
    table, x = AbsolutePositionalEmbedding(8, 12, l2norm_embed), torch.zeros(3, 5, 8)
    for given in ({}, {"offset": 7}, {"seq_start_pos": torch.tensor([0, 2, 4])}, {"pos": torch.arange(5).flip(0)}):
        expected = table(x, **given)
        view = InferenceView(table)
        with view:
            torch.testing.assert_close(view.of(table)(x, **given), expected)
    view = InferenceView(table)
    with view, pytest.raises(ShapeError, match="max_seq_len"):
        view.of(table)(x, offset=8)
    table.emb = nn.Embedding(12, 8, max_norm=0.1)
    assert table.prepare() is None
    assert AbsolutePositionalEmbedding(1024, COPIED_BYTES // 4096 + 1).prepare() is None


def test_changed_weights_are_read_by_the_next_text():
    model, x = AutoregressiveWrapper(build()), torch.randint(0, 20, (1, 4))
    for cache in ("dynamic", "static"):
        model.generate(x, 4, temperature=0.0, cache=cache)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        whole = torch.cat((x, model.generate(x, 4, temperature=0.0, cache=cache)), dim=-1)
        assert torch.equal(model.net(whole)[:, 3:-1].argmax(dim=-1), whole[:, 4:])


def test_maps_that_are_hooked_or_replaced_are_called():
    net = build()
    first, second = projections(net)
    seen = []
    first.q.register_forward_hook(lambda *_: seen.append("hooked"))
    second.v = nn.Sequential(second.v)
    view = InferenceView(net)
    with view, torch.no_grad():
        assert view.of(first).ready is None
        assert view.of(second).ready is None
        view.of(net)(torch.randint(0, 20, (1, 3)))
    assert seen == ["hooked"]


class Counted(torch.Tensor):
    """Another kind of tensor, as quantised weights are."""


def hook(module: nn.Linear) -> None:
    module.register_forward_hook(lambda *_: None)


def hook_before(module: nn.Linear) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def replace_forward(module: nn.Linear) -> None:
    module.forward = lambda x: nn.functional.linear(x, module.weight, module.bias)


def replace_weight(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Counted))


def derive(module: nn.Linear) -> None:
    torch.nn.utils.parametrizations.weight_norm(module)


@pytest.mark.parametrize("change", [hook, hook_before, replace_forward, replace_weight, derive])
def test_only_plain_maps_are_read_without_a_call(change):
    module = nn.Linear(4, 6)
    found = plain_map(module)
    assert found is not None
    assert found.weight is module.weight
    assert found.bias is module.bias
    change(module)
    assert plain_map(module) is None


@pytest.mark.parametrize(
    "part",
    [
        "",
        "pos_emb.emb",
        "attn_layers",
        "attn_layers.layers.0.attention.out",
        "attn_layers.layers.1.feedforward.up",
        "attn_layers.layers.1.feedforward.down",
    ],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_hooks_see_every_token(part, cache):
    model, seen = AutoregressiveWrapper(build()), []
    model.net.get_submodule(part).register_forward_hook(lambda module, *_: seen.append(module))
    model.generate(torch.randint(0, 20, (1, 4)), 3, cache=cache)
    assert seen == [model.net.get_submodule(part)] * 3


def test_hooks_of_all_modules_see_every_token() -> None:
    """The copies run their `forward` at once, but not while the process has hooks on every module."""
    model, seen = AutoregressiveWrapper(build()), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model.generate(tokens(1, 3) % 20, 4, temperature=0.0)
    finally:
        handle.remove()
    assert seen.count(type(model.net.attn_layers)) == 4


def test_a_view_is_freed_without_the_garbage_collector() -> None:
    """It may hold copies of matrices."""
    net = build()
    gc.collect()
    gc.disable()
    try:
        with InferenceView(net) as view:
            copied = view.of(net)
            freed = weakref.ref(copied)
            copied(tokens(1, 3) % 20)
        del view, copied
        assert freed() is None
    finally:
        gc.enable()


def test_large_matrices_are_not_copied():
    wide = 8 * -(-int((COPIED_BYTES / 4 / 3) ** 0.5) // 8) + 8
    part = Projections(
        dim=wide, dim_context=wide, heads=8, kv_heads=8, key_heads=8, dim_head=wide // 8, value_dim_head=wide // 8
    )
    assert part.prepare() is None
