"""Test-time training and episodic memory: every row by hand, nothing left over, nothing changed by steps of size 0."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor, nn
from torch.func import functional_call

from x_transformers import Decoder, Encoder, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.xl_autoregressive_wrapper import (
    EpisodicMemoryWrapper,
    LowRankLinear,
    TTTMetaLearningTargetKLLoss,
    TTTModuleWrapper,
    TTTNextLatentPredictionLoss,
    get_module_by_path,
    newtonschulz5,
    set_module_by_path,
)

VOCAB, DIM, SIZE = 24, 16, 4
DOWN, UP, NORM, QUERIES = (
    "attn_layers.layers.1.1.ff.2",
    "attn_layers.layers.1.1.ff.0.0",
    "attn_layers.layers.2.0.0",
    "attn_layers.layers.0.1.to_q",
)
FEEDFORWARD, TABLE, HEAD = "attn_layers.layers.1.1", "token_emb.emb", "to_logits"
TWIN = "attn_layers.layers.3.1.ff.2"


def build(net: Mapping[str, Any] | None = None, stack: Mapping[str, Any] | None = None, **wrapper: Any) -> Any:
    torch.manual_seed(1)
    layers = Decoder(
        **{"dim": DIM, "depth": 2, "heads": 2, "attn_dim_head": 8, "rotary_pos_emb": True, **(stack or {})}
    )
    model = TransformerWrapper(
        **{"num_tokens": VOCAB, "max_seq_len": SIZE, "max_mem_len": SIZE, **(net or {})}, attn_layers=layers
    )
    perturb(model)
    if wrapper:
        wrapper = {"tbptt_steps": 4, "ttt_lr": 0.3, "ttt_muon_lr": 0.2, **wrapper}
    return perturb(XLAutoregressiveWrapper(model, **wrapper))


def ids(batch: int = 3, n: int = 14) -> Tensor:
    return torch.randint(0, VOCAB, (batch, n), generator=torch.Generator().manual_seed(2))


class Surprise(nn.Module):
    """A loss of one number for each row, of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, record: Any, mask: Tensor) -> Tensor:
        return ((record.last_layer_hiddens * self.scale).square().mean(dim=-1) * mask).sum(dim=-1)


# by hand


def step_by_hand(model: Any, t: Tensor, g: Tensor | None) -> Tensor:
    descent = model._adaptation.descent
    if g is None:
        return t
    lr = descent.lr
    if descent.use_muon and g.ndim >= 2:
        lr, turned = descent.muon_lr, g.shape[0] > g.shape[1]
        g = g.T if turned else g
        g = g / torch.linalg.vector_norm(g).clamp(min=1e-7)
        for _ in range(descent.muon_steps):
            a = g @ g.T
            g = 3.4445 * g + (-4.7750 * a + 2.0315 * a @ a) @ g
        g = g.T if turned else g
    return t - lr * g - lr * descent.wd * t


def row_by_hand(
    model: Any, row: Tensor, times: int = 1, to_end: bool = False
) -> tuple[Tensor, dict[str, Tensor], list[Any] | None]:
    """Return the loss of a row of its own, the weights after it, and the memory."""
    net = model.net
    names = {
        id(each): f"{name}.module"
        for name, each in net.named_modules(remove_duplicate=False)
        if isinstance(each, TTTModuleWrapper)
    }
    pairs = [
        [[f"{names[id(each)]}.{inner}" for inner, _ in each.module.named_parameters()] for each in pair]
        for pair in model._adaptation.pairs
    ]
    used = {name for pair in pairs for each in pair for name in each}
    theta = {name: p for name, p in net.named_parameters() if name in used}
    inputs, labels = row[None, :-1], row[None, 1:]
    shown = inputs.masked_fill(inputs == -100, 0)
    loss, mems, total = 0.0, None, labels.shape[1]
    for number, begin in enumerate(range(0, total, SIZE)):
        part = slice(begin, min(begin + SIZE, total))
        counts = labels[:, part] != -100
        cut = (number + 1) % model.tbptt_steps == 0
        last = begin + SIZE >= total
        for time in range(times):
            logits, record = functional_call(
                net,
                theta,
                (shown[:, part],),
                {"mems": mems, "return_mems": True, "return_intermediates": True, "detach_mems": cut},
            )
            each = F.cross_entropy(logits[0], labels[0, part], reduction="none")
            mean = (each * counts[0]).sum() / counts.sum().clamp(min=1)
            if last and time == times - 1 and not to_end:
                break
            inner = mean
            if model.ttt_custom_loss_module is not None:
                inner = model.ttt_custom_loss_module(record, counts)
                inner = inner.sum() if inner.ndim == 1 else (inner * counts).sum() / counts.sum().clamp(min=1)
            every = list(theta)
            grads = dict(
                zip(
                    every,
                    torch.autograd.grad(
                        inner, list(theta.values()), create_graph=model.training, retain_graph=True, allow_unused=True
                    ),
                    strict=True,
                )
            )
            for sources, targets in pairs:
                for source, target in zip(sources, targets, strict=True):
                    theta[target] = step_by_hand(model, theta[target], grads[source])
            if not model.training:
                theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
        if cut:
            theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
        loss = loss + mean * (part.stop - part.start) / total
        if part.stop - part.start == SIZE:
            mems = record.mems
    assert isinstance(loss, Tensor)
    return loss, theta, mems


WAYS: dict[str, dict[str, Any]] = {
    "linear map": {"ttt_module_paths": (DOWN,)},
    "several": {"ttt_module_paths": (UP, NORM, QUERIES, HEAD)},
    "feedforward": {"ttt_module_paths": (FEEDFORWARD,)},
    "table": {"ttt_module_paths": (TABLE,)},
    "source and target": {"ttt_module_paths": ((DOWN, TWIN),)},
    "low rank": {"ttt_low_rank_paths": ((DOWN, 3),)},
    "muon": {"ttt_module_paths": (DOWN, NORM), "ttt_use_muon": True, "ttt_muon_steps": 2},
    "next latent": {"ttt_module_paths": (UP,), "ttt_next_latent_loss": True},
    "custom": {"ttt_module_paths": (UP,), "ttt_custom_loss_module": Surprise()},
    "episodic": {"ttt_module_paths": ("episodic_mems",), "episodic_mem_len": 2},
    "short": {"ttt_module_paths": (DOWN,), "tbptt_steps": 2},
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_every_row_by_hand(name: str, training: bool) -> None:
    model, x = build(**copy.deepcopy(WAYS[name])).double().train(training), ids()
    x[1, 6], x[2, 4:9] = -100, -100  # a row whose second segment has no label
    wanted = torch.stack([row_by_hand(model, row)[0] for row in x]).mean()
    found = model(x)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (found, wanted))
    for mine, other in zip(first, second, strict=True):
        mine, other = (torch.zeros((), dtype=torch.float64) if each is None else each for each in (mine, other))
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other.expand_as(mine), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear map", "muon"])
def test_segments_are_read_several_times(name: str) -> None:
    model, x = build(**WAYS[name]).double(), ids(2, 10)
    wanted = torch.stack([row_by_hand(model, row, times=3)[0] for row in x]).mean()
    torch.testing.assert_close(model(x, ttt_recurrent_steps=3), wanted, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(model(x), wanted, atol=1e-6)


def test_steps_are_differentiated_through() -> None:
    """Training reaches the initial weights through the steps, and evaluation does not."""
    model, x = build(ttt_module_paths=(DOWN,), ttt_next_latent_loss=True), ids()
    loss = model.ttt_custom_loss_module
    model(x).backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    model.zero_grad()
    model.eval()(x).backward()
    assert all(p.grad is None or not p.grad.any() for p in loss.parameters())


# identities


@pytest.mark.parametrize("name", sorted(set(WAYS) - {"low rank", "episodic"}))
def test_steps_of_size_0_change_nothing(name: str) -> None:
    # the plain model has no part of the adapted one
    plain = build()
    model = XLAutoregressiveWrapper(
        copy.deepcopy(plain.net),
        **{"tbptt_steps": 4, **copy.deepcopy(WAYS[name]), "ttt_lr": 0.0, "ttt_muon_lr": 0.0},
    )
    plain.tbptt_steps = model.tbptt_steps
    x, prompt = ids(), ids(3, 11)
    close(model(x), plain(x), 1e-5)
    # gradients do not reach what is in front of a cut, neither in memories nor in weights
    plain.tbptt_steps = model.tbptt_steps = 4
    model(x).backward()
    plain(x).backward()
    mine = {name.replace(".module", ""): p.grad for name, p in model.net.named_parameters()}
    for name, p in plain.net.named_parameters():
        close(mine[name], p.grad, 1e-5)
    assert torch.equal(model.generate(prompt, 9, temperature=0.0), plain.generate(prompt, 9, temperature=0.0))


@pytest.mark.parametrize("length", [1, 2, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("cache_kv", [True, False])
def test_prompts_of_any_length_with_steps_of_size_0(length: int, cache_kv: bool) -> None:
    """What the rest of a prompt teaches is not in the memory when it is read again."""
    plain = build()
    model = XLAutoregressiveWrapper(copy.deepcopy(plain.net), tbptt_steps=2, ttt_module_paths=(DOWN,), ttt_lr=0.0)
    logits: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, each in enumerate((plain, model)):

        def keep(t: Tensor, number: int = number) -> Tensor:
            logits[number].append(t)
            return t

        torch.manual_seed(0)
        each.generate(ids(2, length), 7, filter_logits_fn=keep, cache_kv=cache_kv)
    close(torch.stack(logits[1]), torch.stack(logits[0]), 1e-5)


@pytest.mark.parametrize("name", ["linear map", "source and target", "low rank", "next latent", "episodic"])
@pytest.mark.parametrize("length", [3, 4, 5, 9])
def test_generation_reads_with_what_the_prompt_has_taught(name: str, length: int) -> None:
    model, prompt = build(**copy.deepcopy(WAYS[name])).double().eval(), ids(2, length)
    found = model.generate(prompt, 6, temperature=0.0)
    assert torch.equal(found, model.generate(prompt, 6, temperature=0.0)), "nothing is left over"
    assert torch.equal(found, model.generate(prompt, 6, temperature=0.0, cache_kv=False))
    for row, new in zip(prompt, found, strict=True):
        _, theta, mems = row_by_hand(model, row, to_end=True)
        # the segments whose labels were known were read with the weights of their time, the rest with the last ones
        rest = torch.cat((row, new))[None, (length - 1) // SIZE * SIZE : -1]
        out = []
        for part in rest.split(SIZE, dim=1):
            logits, mems = functional_call(model.net, theta, (part,), {"mems": mems, "return_mems": True})
            out.append(logits)
        assert torch.equal(torch.cat(out, dim=1)[0, -6:].argmax(dim=-1), new)


def test_rows_do_not_matter_to_each_other() -> None:
    model, x = build(ttt_module_paths=(DOWN,)), ids()
    close(model(x), torch.stack([model(row[None]) for row in x]).mean(), 1e-5)
    prompt = ids(3, 9)
    alone = torch.cat([model.generate(row[None], 5, temperature=0.0) for row in prompt])
    assert torch.equal(model.generate(prompt, 5, temperature=0.0), alone)


# modes


def test_without_gradients() -> None:
    model, x = build(ttt_module_paths=(DOWN, NORM)).eval(), ids()
    wanted = model(x).detach()
    with torch.no_grad():
        found = model(x)
    assert not found.requires_grad
    close(found, wanted)
    with torch.inference_mode():
        _, mems = model.net(ids(3, SIZE), return_mems=True)
        close(model(ids()), wanted)
        again = model(ids(), mems=mems)
    close(again, model(x, mems=[each.clone() for each in mems]).detach())
    with torch.inference_mode():
        model.generate(x, 3, mems=mems)


def test_dropout_inside_is_drawn_for_each_row() -> None:
    model = build(stack={"ff_dropout": 0.5}, ttt_module_paths=(FEEDFORWARD,), ttt_lr=0.0)
    x = ids(1).expand(2, -1).clone()
    wrapper = get_module_by_path(model.net, FEEDFORWARD)
    model.init_ttt(2)
    out = wrapper(torch.randn(1, 5, DIM).expand(2, -1, -1))
    assert not torch.allclose(out[0], out[1])
    assert model(x).isfinite()
    model.eval()
    assert torch.equal(*model.generate(x, 4, temperature=0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = build(ttt_module_paths=(DOWN, TABLE), ttt_use_muon=True, episodic_mem_len=2), ids()
    wanted = model(x).detach()
    model.to(dtype)
    close(model(x).float(), wanted, 0.05)
    model(x).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_small_steps_are_not_rounded_away_in_half_precision() -> None:
    model = build(ttt_module_paths=(DOWN,), ttt_lr=1e-5).bfloat16()
    model.init_ttt(1)
    model.update_ttt(model.net(ids(1, SIZE)), ids(1, SIZE))
    (rows,) = (each.rows for each in model.net.modules() if isinstance(each, TTTModuleWrapper))
    weight = get_module_by_path(model.net, DOWN).module.weight
    moved = rows.weights["weight"][0] != weight
    assert moved.float().mean() > 0.9


def test_autocast() -> None:
    model, x = build(ttt_module_paths=(DOWN,), ttt_use_muon=True), ids()
    wanted = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    close(found.float(), wanted, 0.05)
    found.backward()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["several", "muon", "episodic"])
def test_on_a_gpu(name: str) -> None:
    model, x = build(**copy.deepcopy(WAYS[name])), ids()
    wanted, new = model(x).detach(), model.generate(x, 6, temperature=0.0)
    model.cuda()
    loss = model(x.cuda())
    close(loss.detach().cpu(), wanted, 1e-3)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        close(model(x.cuda()).detach().cpu().float(), wanted, 0.1)
    assert (model.generate(x.cuda(), 6, temperature=0.0).cpu() == new).float().mean() > 0.9


def test_compiled_training_leaves_the_steps_out_of_graphs() -> None:
    model, x = build(ttt_module_paths=(DOWN,)), ids(2, 9)
    close(torch.compile(model, backend="eager")(x), model(x))


# nothing is left over


def direct(model: Any, batch: int = 2) -> Tensor:
    return model.net(ids(batch, SIZE))


def test_the_net_has_its_own_weights_again() -> None:
    model = build(ttt_module_paths=(DOWN,)).eval()
    wanted = direct(model)
    model(ids())
    close(direct(model), wanted)
    model.generate(ids(), 4)
    close(direct(model), wanted)
    stream = model.stream(ids(), 4)
    next(stream)
    close(direct(model), wanted)
    stream.close()
    close(direct(model), wanted)


def test_also_after_an_error() -> None:
    model = build(ttt_module_paths=(UP,), ttt_custom_loss_module=Surprise()).eval()
    wanted = direct(model)
    model.ttt_custom_loss_module.scale = nn.Parameter(torch.ones(DIM + 1))
    for call in (lambda: model(ids()), lambda: model.generate(ids(), 3)):
        with pytest.raises(RuntimeError):
            call()
        close(direct(model), wanted)


def test_hooks_on_an_adapted_module_do_not_keep_its_rows() -> None:
    """A module with hooks runs itself in generation, not a copy."""
    model, calls = build(ttt_module_paths=(DOWN,)).eval(), []
    wrapper = get_module_by_path(model.net, DOWN)
    wanted, plain = direct(model), model.generate(ids(), 4, temperature=0.0)
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids(), 4, temperature=0.0), plain)
    assert calls
    close(direct(model), wanted)


def test_generations_in_threads() -> None:
    model, prompts = build(ttt_module_paths=(DOWN,)).eval(), ids(2, 9)
    wanted = [model.generate(row[None], 6, temperature=0.0) for row in prompts]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(3):
            found[number] = model.generate(prompts[number][None], 6, temperature=0.0)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(found[number], wanted[number]) for number in range(2))


def test_loops_of_users() -> None:
    """`init_ttt` and `update_ttt` do what `forward` does."""
    model, x = build(ttt_module_paths=(DOWN,)).eval(), ids(2, 2 * SIZE + 1)
    wanted = model(x).detach()
    model.init_ttt(2)
    loss, mems = torch.zeros(()), None
    for begin in (0, SIZE):
        labels = x[:, begin + 1 : begin + SIZE + 1]
        logits, mems = model.net(x[:, begin : begin + SIZE], mems=mems, return_mems=True)
        loss = loss + F.cross_entropy(logits.transpose(1, 2), labels) / 2
        model.update_ttt(logits, labels)
    TTTModuleWrapper.reset_all(model)
    close(loss.detach(), wanted)
    with pytest.raises(InputError, match="call `init_ttt`"):
        model.update_ttt(logits, labels)
    model.init_ttt(3)
    with pytest.raises(InputError, match="no axis of 3 rows"):
        direct(model)


def test_replicas_adapt_modules_of_their_own() -> None:
    """`DataParallel` makes shallow copies with other submodules."""
    model, x = build(ttt_module_paths=(DOWN,)), ids()
    replica = model._replicate_for_data_parallel()
    replica.net = perturb(copy.deepcopy(model.net))
    loss = replica(x)
    model.net.load_state_dict(replica.net.state_dict())
    close(loss, model(x))


# places and names


def test_names_in_state_dicts_and_round_trips() -> None:
    way = {
        "ttt_module_paths": (UP, NORM, FEEDFORWARD.replace("1.1", "3.1"), "episodic_mems"),
        "ttt_low_rank_paths": ((QUERIES, 3),),
        "ttt_next_latent_loss": True,
        "episodic_mem_len": 2,
    }
    model, x = build(**way), ids()
    theirs = model.export_reference_state_dict()
    layers = "net.net.attn_layers.layers"
    for name in (
        f"{layers}.1.1.ff.0.0.module.weight",
        f"{layers}.2.0.0.module.gamma",
        f"{layers}.3.1.module.ff.2.weight",
        f"{layers}.0.1.to_q.module.weight_a",
        f"{layers}.0.1.to_q.module.weight_b",
        "net.episodic_mems.module.mem_kv",
        "ttt_custom_loss_module.predictor.5.bias",
    ):
        assert name in theirs, name
    twin = XLAutoregressiveWrapper.from_config(model.config)
    twin.load_state_dict(theirs)
    close(twin(x), model(x))
    other = XLAutoregressiveWrapper.from_config(model.config)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(other.parameters(), model.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x), model(x))
    close(copy.deepcopy(model)(x), model(x))


def test_matrices_of_low_rank_have_the_order_of_heads_of_the_reference() -> None:
    stack = {"heads": 4, "attn_kv_heads": 2}
    out = "attn_layers.layers.0.1.to_out"
    model = build(stack=stack, ttt_low_rank_paths=((QUERIES, 3), (out, 2)))
    plain = build(stack=stack)
    for path in (QUERIES, out):
        low = get_module_by_path(model.net, path).module
        get_module_by_path(plain.net, path).weight.data = (low.weight_a @ low.weight_b).detach()
    theirs, wanted = model.export_reference_state_dict(), plain.export_reference_state_dict()
    for path in (QUERIES, out):
        a, b = (theirs[f"net.{path}.module.weight_{factor}"] for factor in "ab")
        close(a @ b, wanted[f"net.{path}.weight"])
    twin = XLAutoregressiveWrapper.from_config(model.config)
    twin.load_state_dict(theirs)
    assert all(torch.equal(one, two) for one, two in zip(twin.parameters(), model.parameters(), strict=True))


def test_two_wrappers_share_adapted_modules() -> None:
    model = build(ttt_module_paths=(DOWN,))
    again = XLAutoregressiveWrapper(model.net, tbptt_steps=4, ttt_module_paths=(DOWN,), ttt_lr=0.3)
    assert list(again.net.state_dict()) == list(model.net.state_dict())
    close(again(ids()), model(ids()))


def test_paths() -> None:
    net = build().net
    assert get_module_by_path(net, UP) is net.attn_layers.layers[1].feedforward.up
    set_module_by_path(net, UP, other := nn.Linear(DIM, 4 * DIM))
    assert net.attn_layers.layers[1].feedforward.up is other


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown path": ({"ttt_module_paths": ("attn_layers.nothing.ff",)}, "'attn_layers.nothing.ff'.* no part 'nothing'"),
    "unknown low rank": ({"ttt_low_rank_paths": (("head", 2),)}, "`ttt_low_rank_paths`: there is no module 'head'"),
    "attention": (
        {"ttt_module_paths": ("attn_layers.layers.0.1",)},
        "of type Attention; only modules that map each token",
    ),
    "stack": ({"ttt_module_paths": ("attn_layers",)}, "Inside of it there are 'attn_layers.*"),
    "several parts": ({"ttt_module_paths": ("attn_layers.layers.1.1.ff.0",)}, r"name one of them: '.*ff\.0\.0'"),
    "twice": ({"ttt_module_paths": (DOWN,), "ttt_low_rank_paths": ((DOWN, 2),)}, "is named twice"),
    "inside": ({"ttt_module_paths": (DOWN, FEEDFORWARD)}, "one is inside of the other"),
    "shapes": ({"ttt_module_paths": ((UP, DOWN),)}, "shapes must be equal"),
    "three paths": ({"ttt_module_paths": ((UP, DOWN, UP),)}, "pairs of the paths of a source and a target"),
    "rank": ({"ttt_low_rank_paths": ((DOWN, DIM),)}, f"a rank of {DIM} .* between 1 and {DIM - 1}"),
    "low rank of a norm": ({"ttt_low_rank_paths": ((NORM, 2),)}, "of type LayerNorm; it must be a linear map"),
    "no rank": ({"ttt_low_rank_paths": (DOWN,)}, "`ttt_low_rank_paths`"),
    "gradients": ({"ttt_module_paths": (DOWN,), "tbptt_steps": 1}, "`tbptt_steps` is 1"),
    "negative": ({"ttt_module_paths": (DOWN,), "ttt_lr": -1.0}, "`ttt_lr` is -1.0"),
    "no iterations": ({"ttt_module_paths": (DOWN,), "ttt_muon_steps": 0}, "`ttt_muon_steps` is 0"),
    "no paths": ({"ttt_next_latent_loss": True}, "there are none; give `ttt_module_paths`"),
    "two losses": (
        {"ttt_module_paths": (DOWN,), "ttt_next_latent_loss": True, "ttt_custom_loss_module": nn.Identity()},
        "both losses of a step",
    ),
    "negative memory": ({"episodic_mem_len": -1}, "`episodic_mem_len` is -1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    options, said = REFUSALS[name]
    plain = build().net
    names = list(plain.state_dict())
    with pytest.raises(ConfigError, match=said):
        XLAutoregressiveWrapper(plain, **{"tbptt_steps": 2, **options})
    assert list(plain.state_dict()) == names, "a model that is refused is not changed"


NETS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied": ({"tie_embedding": True}, {}, "also that of the logits"),
    "norm with condition": ({}, {"use_adaptive_layernorm": True}, "norms without a condition"),
    "norm without parameters": ({}, {"use_simple_rmsnorm": True}, "has no parameters"),
    "checkpoints": ({}, {"checkpoint_every": 1}, "`checkpoint_every` runs blocks again"),
}


@pytest.mark.parametrize("name", NETS)
def test_refused_nets(name: str) -> None:
    net, stack, said = NETS[name]
    with pytest.raises(ConfigError, match=said):
        build(net, stack, ttt_module_paths=(NORM, TABLE))


def test_refused_wrapped_nets_and_arguments() -> None:
    model = build(ttt_module_paths=(DOWN,))
    with pytest.raises(ConfigError, match="Give the model itself"):
        XLAutoregressiveWrapper(torch.compile(build().net), tbptt_steps=2, ttt_module_paths=(DOWN,))
    with pytest.raises(InputError, match="`ttt_recurrent_steps` is 0"):
        model(ids(), ttt_recurrent_steps=0)
    with pytest.raises(InputError, match="give `ttt_module_paths`"):
        build()(ids(), ttt_recurrent_steps=2)
    model = build(ttt_module_paths=(DOWN,), ttt_custom_loss_module=Surprise())
    model.init_ttt(2)
    logits = direct(model)
    with pytest.raises(InputError, match="give it as `intermediates`"):
        model.update_ttt(logits, ids(2, SIZE))
    model.ttt_custom_loss_module.forward = lambda record, mask: record.last_layer_hiddens
    with pytest.raises(InputError, match=r"returned shape \(3, 4, 16\); it must be \(3, 4\)"):
        model(ids())


# parts


def test_low_rank_maps() -> None:
    linear = nn.Linear(6, 5)
    low = LowRankLinear(linear, 2)
    assert {name: tuple(p.shape) for name, p in low.named_parameters()} == {
        "weight_a": (5, 2),
        "weight_b": (2, 6),
        "bias": (5,),
    }
    close(low(torch.randn(3, 6)), linear.bias.expand(3, -1))
    perturb(low)
    x = torch.randn(3, 6)
    close(low(x), x @ (low.weight_a @ low.weight_b).T + low.bias)


def test_orthogonalized_matrices() -> None:
    t = torch.randn(3, 6, 4, dtype=torch.float64)
    values = torch.linalg.svdvals(newtonschulz5(t, steps=8))
    assert values.min() > 0.6
    assert values.max() < 1.3
    close(newtonschulz5(t.mT), newtonschulz5(t).mT)
    assert not newtonschulz5(torch.zeros(2, 3)).any()
    zero = torch.zeros(2, 3, requires_grad=True)
    newtonschulz5(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    with pytest.raises(InputError, match="must hold matrices"):
        newtonschulz5(torch.zeros(3))


def record_of(features: Tensor) -> LayerIntermediates:
    return LayerIntermediates(last_layer_hiddens=features)


def test_loss_of_the_next_features() -> None:
    h, mask = torch.randn(2, 4, DIM), torch.tensor([[True] * 4, [False, True, True, False]])
    loss = TTTNextLatentPredictionLoss(dim=DIM, hidden_dim=8, loss_type="mse")
    assert [name for name, _ in loss.named_parameters()][::2] == [f"predictor.{i}.weight" for i in (0, 1, 3, 5)]
    predicted = loss.predictor(h)
    wanted = torch.stack([(predicted[:, t] - h[:, (t + 1) % 4]).square().mean(dim=-1) for t in range(4)], dim=1)
    close(loss(record_of(h)), wanted)
    wanted = wanted * torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    close(loss(record_of(h), mask), wanted)
    h.requires_grad_()
    loss(record_of(h)).sum().backward()
    targets = h.detach().roll(-1, dims=1)
    other = h.detach().requires_grad_()
    F.mse_loss(loss.predictor(other), targets, reduction="none").mean(dim=-1).sum().backward()
    close(h.grad, other.grad)  # targets are constants


def test_loss_of_learned_targets() -> None:
    h, mask = torch.randn(2, 4, DIM), torch.tensor([[True] * 4, [True, True, True, False]])
    loss = TTTMetaLearningTargetKLLoss(dim=DIM, num_classes=5, heads=2, dim_head=8)
    assert isinstance(loss.encoder, Encoder)
    p = loss.to_prediction(h).softmax(dim=-1)
    q = loss.to_meta_prediction(loss.encoder(h, mask=mask)).softmax(dim=-1)
    close(loss(record_of(h), mask), (p * (p.log() - q.log())).sum(dim=-1))
    twin = TTTMetaLearningTargetKLLoss.from_config(loss.config)
    twin.load_state_dict(loss.state_dict())
    close(twin(record_of(h), mask), loss(record_of(h), mask))
    for options, said in (({"loss_type": "l2"}, "'smooth_l1' or 'mse'"), ({"num_layers": 0}, "`num_layers` is 0")):
        with pytest.raises(ConfigError, match=said):
            TTTNextLatentPredictionLoss(dim=DIM, **options)


# episodic memory


def test_episodic_memory_is_additional_keys_and_values() -> None:
    model, x = build(episodic_mem_len=3), ids(2, SIZE)
    mem_kv = model.net.episodic_mems.mem_kv
    assert mem_kv.shape == (2, 2, 2, 3, 8)
    pairs = [(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)) for k, v in zip(*mem_kv, strict=True)]
    close(model.net(x), model.net.net(x, self_attn_additional_kv=pairs))
    assert not torch.allclose(model.net(x), model.net.net(x), atol=1e-3)
    assert all(name.startswith("net.net.") or name == "net.episodic_mems.mem_kv" for name in model.state_dict())


@pytest.mark.parametrize(
    "stack", [{}, {"attn_kv_heads": 1}, {"custom_layers": ("a", "f", "a"), "depth": None}], ids=str
)
def test_generation_with_episodic_memory(stack: dict[str, Any]) -> None:
    model, prompt = build(stack=stack, episodic_mem_len=3).eval(), ids(2, 6)
    new = model.generate(prompt, 7, temperature=0.0)
    assert torch.equal(new, model.generate(prompt, 7, temperature=0.0, cache_kv=False))
    out, mems = [], None
    for part in torch.cat((prompt, new), dim=1)[:, :-1].split(SIZE, dim=1):
        logits, mems = model.net(part, mems=mems, return_mems=True)
        out.append(logits)
    assert torch.equal(torch.cat(out, dim=1)[:, 5:].argmax(dim=-1), new)


def test_episodic_memory_draws_only_itself() -> None:
    """The number of layers is known without running any of them."""
    net = build(stack={"attn_dropout": 0.5, "layer_dropout": 0.5}).net.train()
    net.attn_layers.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    torch.manual_seed(5)
    wrapped = EpisodicMemoryWrapper(net, 3)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randn(2, 2, 2, 3, 8)
    close(wrapped.episodic_mems.mem_kv, nn.init.normal_(torch.empty(2, 2, 2, 3, 8), std=0.02))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ({"custom_layers": ("f",), "depth": None, "rotary_pos_emb": False}, "the stack has none"),
        ({"attn_value_dim_head": 4}, "in one tensor"),
        ({"polar_pos_emb": True, "rotary_pos_emb": False}, "keys are twice as wide"),
    ],
)
def test_stacks_without_room_for_episodic_memory(stack: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(stack=stack, episodic_mem_len=3)


def test_other_additional_keys_are_refused() -> None:
    model, pair = build(episodic_mem_len=3), torch.randn(2, 2, 1, 8)
    with pytest.raises(InputError, match="`self_attn_additional_kv` cannot be given"):
        model(ids(2), self_attn_additional_kv=[(pair, pair)] * 2)
