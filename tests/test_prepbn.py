"""Progressive batch norm: numbers of a public implementation, statistics of batches, and when they are taken over."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from catalog import close, perturbed
from safetensors import safe_open
from torch import Tensor

from x_transformers import (
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
)
from x_transformers.errors import ConfigError, InputError
from x_transformers.layers.batch_norms import advance_all_norms, forget_statistics
from x_transformers.modules.prepbn import PENDING, PrepBN, joined
from x_transformers.training.train import train
from x_transformers.training.trained import trained_model

FILE = Path(__file__).with_name("golden") / "mixers" / "layer-prepbn.safetensors"
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False}
NORM = {"use_prepbn": True, "prepbn_steps": 10}


def model_of(**options: Any) -> TransformerWrapper:
    around = {name: options.pop(name) for name in ("max_mem_len", "num_memory_tokens") if name in options}
    layers = Decoder(**{**SMALL, **NORM, "rotary_pos_emb": True, **options})
    return perturbed(TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=layers, **around))


def norms_of(model: torch.nn.Module) -> list[PrepBN]:
    return [module for module in model.modules() if isinstance(module, PrepBN)]


def buffers_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, buffer in mine.items():
        close(buffer.float(), theirs[name].float())


# numbers


def test_the_norm_is_that_of_a_public_implementation() -> None:
    with safe_open(FILE, "pt") as file:
        case = {key: file.get_tensor(key) for key in list(file.keys())}
    stack = Encoder(**SMALL, **NORM)
    norm, x = stack.final_norm, case["input.x"]
    assert type(norm) is PrepBN
    names = {
        "layer_gamma": "norm.gamma",
        "layer_beta": "norm.beta",
        "gamma": "batch.gamma",
        "beta": "batch.beta",
        "running_mean": "batch.mean",
        "running_var": "batch.var",
        "eta": "eta",
    }
    state = {mine: case[f"state.{theirs}"] for mine, theirs in names.items()}
    norm.load_state_dict({**state, "steps_done": 10 - case["state.left"]})
    assert case["state.left"] == 7
    close(norm.eval()(x), case["output"])
    close(norm.train()(x), case["output.training"])
    norm.advance(norm.statistics_of(x, None))
    close(norm.running_mean, case["output.mean"])
    close(norm.running_var, case["output.var"])
    assert norm.steps_done == 4


def test_training_begins_with_layer_norm_and_ends_with_batch_norm() -> None:
    x = torch.randn(3, 5, 16)
    norm = perturbed(PrepBN(16, steps=2)).train()
    gains, batch = norm.gamma.detach(), x.flatten(0, 1)
    by_batch = F.batch_norm(batch, None, None, gains, norm.beta, True, 0.0, 1e-5).unflatten(0, (3, 5)) + norm.eta * x
    for wanted in (norm.by_layer(x), (norm.by_layer(x) + by_batch) / 2, by_batch, by_batch):
        close(norm(x), wanted)
        norm.advance(norm.statistics_of(x, None))


def test_in_training_gradients_pass_through_the_statistics() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    norm = perturbed(PrepBN(4, steps=4)).double().train()
    norm.steps_done += 3
    assert torch.autograd.gradcheck(norm, (x,))
    norm(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in norm.parameters())


def test_the_affine_map_of_evaluation_is_prepared_once() -> None:
    norm = perturbed(PrepBN(16))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 16)
    wanted = norm(x)
    norm.ready = norm.prepare()
    assert torch.equal(norm(x), wanted)
    # buffers stay in float32, and half precision is computed in it
    half = copy.deepcopy(norm).bfloat16()
    assert half.running_var.dtype is torch.float32
    assert half(x.bfloat16()).dtype is torch.bfloat16


# statistics of a pass


@pytest.mark.parametrize("options", [{}, {"num_residual_streams": 2}, {"parallel_block": True}, {"shift_tokens": 1}])
def test_padding_has_no_part_in_statistics(options: dict[str, Any]) -> None:
    """Nor in the outputs of live tokens, whatever is in the padding."""
    model = model_of(**options).train()
    for norm in norms_of(model):
        norm.steps_done += 6
    ids, live = torch.randint(0, 24, (2, 9)), torch.arange(9) < torch.tensor([[9], [6]])
    out, record = model(ids, mask=live, return_aux_loss=True)
    other, _ = model(torch.where(live, ids, (ids + 5) % 24), mask=live, return_aux_loss=True)
    close(other[live], out[live])
    assert [each.tokens.item() for each in record.norm_statistics] == [15.0] * 5
    # the same rows with padding on the left
    right = torch.stack((ids[0], ids[1].roll(3)))
    left, again = model(right, seq_start_pos=torch.tensor([0, 3]), return_aux_loss=True)
    close(left[1, 3:], out[1, :6])
    for one, two in zip(record.norm_statistics, again.norm_statistics, strict=True):
        close(one.mean, two.mean)
        close(one.var, two.var)


def test_memory_tokens_count() -> None:
    model = model_of(num_memory_tokens=3).train()
    _, record = model(torch.randint(0, 24, (2, 9)), return_aux_loss=True)
    assert [each.tokens.item() for each in record.norm_statistics] == [24.0] * 5


def test_memories_have_the_statistics_of_the_tokens() -> None:
    model = model_of(max_mem_len=4).train()
    norm = model.attn_layers.layers[0].norm
    norm.steps_done += 10
    ids = torch.randint(0, 24, (2, 9))
    _, mems = model(ids, return_mems=True)
    seen = []
    norm.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    model(ids, mems=mems)
    (memory, normed), (x, _) = seen
    statistics = norm.statistics_of(x, None)
    slope, shift = norm._affine(statistics.mean, statistics.var)
    close(normed, memory * slope + shift)


def test_blocks_that_run_again_leave_the_same_statistics_and_gradients() -> None:
    plain = model_of(depth=3).train()
    again = model_of(depth=3, checkpoint_every=1).train()
    again.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 24, (2, 9))
    found = []
    for model in (plain, again):
        for norm in norms_of(model):
            norm.steps_done += 5
        before = buffers_of(model)
        out, record = model(ids, return_aux_loss=True)
        out.square().mean().backward()
        equal(buffers_of(model), before)
        found.append((out, record))
        model.advance_norms(record)
    assert torch.equal(found[0][0], found[1][0])
    equal(buffers_of(plain), buffers_of(again))
    for mine, theirs in zip(plain.parameters(), again.parameters(), strict=True):
        close(mine.grad, theirs.grad)


# steps


def test_accumulated_passes_are_one_batch() -> None:
    """Of the statistics that the embeddings have, since later ones depend on the batch."""
    ids = torch.randint(0, 24, (4, 9))
    whole, parts = model_of().train(), model_of().train()
    parts.load_state_dict(whole.state_dict())
    whole.advance_norms(whole(ids, return_aux_loss=True)[1])
    records = [parts(part, return_aux_loss=True)[1] for part in (ids[:1], ids[1:])]
    parts.advance_norms(records)
    mine, theirs = parts.attn_layers.layers[0].norm, whole.attn_layers.layers[0].norm
    equal(dict(mine.named_buffers()), dict(theirs.named_buffers()))
    assert [norm.steps_done for norm in norms_of(parts)] == [1] * 5
    # an objective leaves its passes by itself
    again = model_of().train()
    again.load_state_dict(parts.state_dict())
    for norm in norms_of(again):
        norm.load_state_dict({**norm.state_dict(), **norm.derived_buffers()})
    objective = AutoregressiveWrapper(again)
    for part in (ids[:1], ids[1:]):
        objective(part)
    again.advance_norms()
    equal(buffers_of(again), buffers_of(parts))


def test_layers_that_run_twice_join_their_statistics() -> None:
    model = model_of(depth=1, layers_execute_order=(0, 1, 0, 1)).train()
    _, record = model(torch.randint(0, 24, (2, 9)), return_aux_loss=True)
    assert [each.number for each in record.norm_statistics] == [0, 1, 0, 1, 2]
    first, _, second, _, _ = record.norm_statistics
    model.advance_norms(record)
    norm = model.attn_layers.layers[0].norm
    close(norm.running_mean, 0.1 * (first.mean + second.mean) / 2)
    assert norm.steps_done == 1


def test_an_evaluated_model_decodes_as_it_reads() -> None:
    model, ids = model_of().train(), torch.randint(0, 24, (2, 9))
    for _ in range(3):
        model.advance_norms(model(torch.randint(0, 24, (2, 9)), return_aux_loss=True)[1])
    model.eval()
    whole = model(ids)
    close(model(ids[:1]), whole[:1])
    _, cache = model(ids[:, :4], return_intermediates=True)
    close(model(ids, cache=cache, input_not_include_cache=False), whole[:, 4:])
    generated = AutoregressiveWrapper(model).generate(ids, 1, temperature=0.0)
    assert torch.equal(generated.flatten(), whole[:, -1].argmax(dim=-1))
    assert model(ids, return_intermediates=True)[1].norm_statistics is None


def test_a_model_learns_in_training_what_it_uses_in_evaluation() -> None:
    model = model_of()
    objective, rows = AutoregressiveWrapper(model).train(), torch.randint(0, 24, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        objective(rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        advance_all_norms(objective)
    trained = objective(rows).item()
    with torch.no_grad():
        evaluated = objective.eval()(rows).item()
    assert evaluated < 1.5 * trained + 0.1 < 2


def test_without_a_live_token_statistics_stay() -> None:
    norm, x = perturbed(PrepBN(4)).train(), torch.randn(2, 3, 4)
    none = norm.statistics_of(x, torch.zeros(2, 3, dtype=torch.bool))
    assert norm(x, statistics=none).isfinite().all()
    norm.advance(joined([none, none]))
    assert norm.steps_done == 1
    close(norm.running_var, torch.ones(4))
    some = norm.statistics_of(x, None)
    close(joined([none, some]).mean, some.mean)
    close(joined([none, some]).var, some.var)


def test_statistics_of_both_stacks_are_taken_over() -> None:
    sizes = {"num_tokens": 24, "max_seq_len": 12, "depth": 1, "heads": 2, "attn_dim_head": 8, **NORM}
    both = {prefix + name: value for name, value in sizes.items() for prefix in ("enc_", "dec_")}
    model = XTransformer(dim=16, **both).train()
    model(torch.randint(0, 24, (2, 7)), torch.randint(0, 24, (2, 7)))
    advance_all_norms(model)
    assert {norm.steps_done.item() for norm in norms_of(model)} == {1}
    forget_statistics(model)


def test_all_segments_of_a_loss_count() -> None:
    model = XLAutoregressiveWrapper(model_of(max_mem_len=8)).train()
    model(torch.randint(0, 24, (2, 33)))
    norm = norms_of(model)[0]
    assert PENDING[norm].tokens == 64
    forget_statistics(model)
    assert norm not in PENDING


def test_processes_join_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 4)
    norm, other = PrepBN(4), PrepBN(4)
    norm.advance(norm.statistics_of(x, None))
    # two processes with a part each, one after the other
    parts = [other.statistics_of(part, None) for part in (x[:2], x[2:])]
    mean = x.mean(dim=0)
    sums = iter(
        [
            torch.tensor(6.0),
            x.sum(dim=0),
            sum(each.tokens * (each.var + (each.mean - mean).square()) for each in parts),
        ]
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.copy_(next(sums)))
    other.advance(parts[0])
    equal(dict(norm.named_buffers()), dict(other.named_buffers()))


def test_a_run_takes_over_the_statistics_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    chosen = {"depth": 1, "dim": 32, "heads": 2, "attn_dim_head": 32, "use_rmsnorm": False, **NORM}
    given = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    numbers = [
        "--steps",
        "3",
        "--rows",
        "4",
        "--context",
        "32",
        "--accumulate",
        "2",
        "--loss-chunk",
        "16",
        "--tokenizer",
        "bytes",
    ]
    train(["--data", str(tmp_path / "text"), *given, *numbers, "--out", str(tmp_path / "run")])
    norms = norms_of(trained_model(tmp_path / "run"))
    assert [norm.steps_done.item() for norm in norms] == [3, 3, 3]
    assert all((norm.running_var != 1).all() for norm in norms)


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_bias": True}, "has biases by itself; drop `norm_bias`"),
        ({"prepbn_steps": 0}, "`prepbn_steps` is 0"),
        ({"pre_norm": False}, "set `pre_norm = True`, and drop"),
        ({"sandwich_norm": True}, "drop `pre_and_post_norm`, `sandwich_norm`"),
        ({"branch_norm": True}, "`branch_norm`"),
        ({"resi_dual": True}, "`resi_dual`"),
        ({"num_residual_streams": 2, "qkv_receive_diff_residuals": True}, "gives it three inputs"),
        ({"parallel_block": True, "parallel_block_one_norm": True}, "leaves one norm for several"),
        ({"use_rmsnorm": True}, "alternatives of one choice"),
    ],
)
def test_what_has_no_statistics_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**{**SMALL, **NORM, **options})


def test_exits_are_refused() -> None:
    with pytest.raises(ConfigError, match="use another norm"):
        TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=Decoder(**SMALL, **NORM), exit_layers=(1,))


def test_steps_without_statistics_are_refused() -> None:
    model, ids = model_of(), torch.randint(0, 24, (2, 9))
    with pytest.raises(InputError, match="there are no statistics of norms here"):
        model.advance_norms()
    _, record = model(ids, return_aux_loss=True)
    with pytest.raises(InputError, match="run a pass in training mode"):
        model.advance_norms(record)
    with pytest.raises(InputError, match="no norm has statistics of batches"):
        Decoder(**SMALL).advance_norms()
    with pytest.raises(InputError, match="must be of type LayerIntermediates"):
        model.advance_norms([record, None])  # type: ignore[list-item]
