"""Early exits: numbers of public implementations, losses, and what is refused."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import BASE, close, perturbed, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from x_transformers import (
    AutoregressiveWrapper,
    Decoder,
    PrefixDecoder,
    TransformerWrapper,
    layer_schedule,
    load_pretrained,
)
from x_transformers.errors import ConfigError, InputError, StateDictError
from x_transformers.losses import mean_over, token_losses
from x_transformers.models.exit_losses import ExitLosses, exit_losses

FOLDER = Path(__file__).with_name("golden") / "experts"
CLOSE = 2e-5


def read(name: str) -> dict[str, Tensor]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}


def model_of(depth: int = 4, exits: tuple[int, ...] | None = (1, 3), **options: Any) -> TransformerWrapper:
    return BASE.build(depth=depth, exit_layers=exits, **options)


# numbers of public implementations


@pytest.fixture
def llama(tmp_path: Path) -> tuple[TransformerWrapper, dict[str, Tensor]]:
    """A model of four blocks, with exits after the first three."""
    case = read("early-exit-llama")
    weights = {key.removeprefix("state."): value for key, value in case.items() if key.startswith("state.")}
    save_file(weights, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_pretrained(tmp_path, exit_layers=(1, 2, 3)).eval(), case


def test_logits_after_each_block(llama: tuple[TransformerWrapper, dict[str, Tensor]]) -> None:
    model, case = llama
    out, exits = model(case["input.ids"], return_exits=True)
    for block, logits in {**exits, 4: out}.items():
        assert (logits - case[f"output.logits_after_{block}"]).abs().max() < CLOSE


def test_tokens_of_an_exit_and_of_self_speculation(llama: tuple[TransformerWrapper, dict[str, Tensor]]) -> None:
    model, case = llama
    wrapper = AutoregressiveWrapper(model)
    count = case["output.greedy"].shape[1]
    for name, options in {
        "greedy": {},
        "greedy_of_2_layers": {"exit_layer": 2},
        "self_speculative_exit_2": {"draft_layers": 2},
    }.items():
        ids, wanted = case["input.ids"], case[f"output.{name}"]
        new = wrapper.generate(ids, count, temperature=0.0, **options)
        assert wanted.tolist() in (new.tolist(), torch.cat((ids, new), dim=1)[:, :count].tolist()), name


RULES = {"uniform": "equal", "linear_l": "linear", "sum_l": "sum"}


def losses_of(exits: tuple[int, ...], **options: Any) -> ExitLosses:
    found = ExitLosses.of(model_of(6, exits), **{"weights": "sum", "scale": 1.0, "every": 1, **options})
    assert found is not None
    return found


@pytest.mark.parametrize("rule", RULES)
def test_weights_of_the_exits(rule: str) -> None:
    """The numbers are those of all blocks: of a part of them, the other implementation counts exits, not blocks."""
    wanted = read("layerskip-schedules")[f"output.{rule}_loss_scale.0_1_2_3_4_5"]
    shares = losses_of((1, 2, 3, 4, 5), weights=RULES[rule], scale=0.3).shares(None)
    assert list(shares) == [1, 2, 3, 4, 5, 6]
    close(torch.tensor(list(shares.values())), wanted)


def test_numbers_as_weights_and_the_loss() -> None:
    case = read("layerskip-schedules")
    exits = {number: case[f"input.hidden.{number}"] @ case["state.head"].T for number in (1, 3, 5)}
    labels = case["input.labels"]
    # theirs count blocks from 0, and use the weights of the first three exits
    shares = losses_of((2, 4), weights=(1, 3, 6), scale=0.3).shares(None)
    close(torch.tensor(list(shares.values())), case["output.sum_l_loss_scale.1_3_5"])
    each = exit_losses(lambda logits: token_losses(logits, labels), shares, {2: exits[1], 4: exits[3]}, exits[5])
    close(mean_over(each, labels != -100), case["output.loss"])


def test_layer_dropout_of_the_blocks() -> None:
    case = read("layerskip-schedules")
    close(torch.tensor(layer_schedule(0.0, 0.2, 6, "exp2")), case["output.dropout_rate.exp"])
    close(torch.tensor(layer_schedule(0.0, 0.2, 6, "linear")), case["output.dropout_rate.linear"])


def test_norms_of_exits_begin_as_the_final_norm_of_loaded_weights(
    llama: tuple[TransformerWrapper, dict[str, Tensor]], tmp_path: Path
) -> None:
    model = load_pretrained(tmp_path, exit_layers=(1, 4), exit_norms=True)
    assert model.exit_norms is not None
    assert list(model.exit_norms) == ["1"]
    final_norm = llama[0].attn_layers.final_norm
    assert final_norm is not None
    for mine, final in zip(model.exit_norms["1"].parameters(), final_norm.parameters(), strict=True):
        assert mine is not final
        assert torch.equal(mine, final)


# losses


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("norms", [False, True])
def test_the_training_loss_is_the_weighted_mean_of_the_exits(norms: bool, chunk: int | None) -> None:
    model = model_of(exit_norms=norms, num_memory_tokens=2)
    wrapper = AutoregressiveWrapper(model, exit_loss_weights="linear", exit_loss_scale=0.5, loss_chunk_size=chunk)
    x, prepended = tokens(2, 9), torch.randn(2, 2, 16)
    x[0, 6:] = -100
    with torch.no_grad():
        alone = [
            AutoregressiveWrapper(net).eval()(x, prepend_embeds=prepended)
            for net in (model.shallow(1), model.shallow(3), model)
        ]
        close(wrapper.eval()(x, prepend_embeds=prepended), alone[2])
    loss = wrapper.train()(x, prepend_embeds=prepended)
    close(loss, (0.5 * alone[0] + 1.5 * alone[1] + 4 * alone[2]) / 6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_exits_take_turns() -> None:
    """Exits that are left out cost no logits; the end takes part in each step."""
    model = model_of(exits=(1, 2, 3), exit_norms=True).train()
    wrapper = AutoregressiveWrapper(model, exit_loss_weights="equal", exit_loss_every=2)
    x = tokens(2, 9)
    for step, used in ((0, {1, 3}), (1, {2}), (2, {1, 3})):
        model.zero_grad()
        read: list[tuple[int, ...]] = []
        assert model.to_logits is not None
        handle = model.to_logits.register_forward_hook(lambda *args, read=read: read.append(tuple(args[2].shape)))
        wrapper(x, exit_step=step).backward()
        handle.remove()
        assert len(read) == len(used) + 1
        assert model.exit_norms is not None
        for block, norm in model.exit_norms.items():
            learns = any(p.grad is not None and p.grad.abs().sum() > 0 for p in norm.parameters())
            assert learns is (int(block) in used)
            # where processes exchange gradients, each parameter needs one
            assert all(p.grad is not None for p in norm.parameters())
    with pytest.raises(InputError, match="pass `exit_step`"):
        wrapper(x)
    assert torch.isfinite(wrapper.eval()(x))


def test_an_exit_after_the_last_block_is_the_end() -> None:
    model, x = model_of(exits=(2, 4), exit_norms=True), tokens(2, 9)
    out, exits = model(x, return_exits=True)
    close(exits[4], out)
    assert list(model(x, return_exits=(2,))[1]) == [2]
    wrapper = AutoregressiveWrapper(model, exit_loss_weights=(1.0, 3.0))
    close(
        wrapper.train()(x),
        (AutoregressiveWrapper(model.shallow(2)).eval()(x) + 3 * wrapper.eval()(x)) / 4,
    )


# models of the first blocks


def test_a_shallow_model_is_a_view() -> None:
    model, x = model_of(exits=(1, 2, 3), exit_norms=True, tie_embedding=True), tokens(2, 9)
    view = model.shallow(2)
    before = model(x)
    assert view.exit_layers == (1,)
    assert list(view.exit_norms or ()) == ["1"]
    assert {id(p) for p in view.parameters()} < {id(p) for p in model.parameters()}
    out = view(x)
    assert not torch.equal(out, model.shallow(3)(x))
    model.load_state_dict(perturbed(model_of(exits=(1, 2, 3), exit_norms=True, tie_embedding=True)).state_dict())
    assert not torch.equal(view(x), out)
    close(view(x), model(x, return_exits=True)[1][2])
    assert not torch.equal(model(x), before)
    # children of the view are exchanged without a change of the model
    view.attn_layers.final_norm = None
    assert model.attn_layers.final_norm is not None
    close(copy.deepcopy(model.shallow(2))(x), model(x, return_exits=True)[1][2])
    with pytest.raises(ConfigError, match="no configuration of its own"):
        _ = view.config
    assert AutoregressiveWrapper(view).config["options"]["net"] == {"$object": "net"}


@pytest.mark.parametrize(
    "options",
    [
        {"weight_tie_layers": True},
        {"layers_execute_order": (0, 1, 0, 1, 2, 3, 0, 1), "depth": 2},
        {"custom_layers": ("a", "f", "f", "a"), "depth": None},
        {"macaron": True},
        {"num_residual_streams": 2},
        {"shift_tokens": 1, "attn_max_attend_past": 2},
        {"mixer": "retention", "layer_period": "ma"},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_whole_model(options: dict[str, Any]) -> None:
    """Guesses change no token, whatever the kind of blocks; one exit is the model of these blocks."""
    torch.manual_seed(1)
    model = BASE.build(**{"depth": 4, "exit_layers": (1, 3), **options})
    wrapper, prompts = AutoregressiveWrapper(model), [tokens(1, n)[0] for n in (7, 4, 2)]
    wanted = wrapper.generate(prompts, 10, temperature=0.0)
    for draft in (1, 3):
        new = wrapper.generate(prompts, 10, temperature=0.0, draft_layers=draft, draft_tokens=3, cache="static")
        assert torch.equal(new, wanted)
        shallow = AutoregressiveWrapper(model.shallow(draft))
        exit_tokens = wrapper.generate(prompts, 10, temperature=0.0, exit_layer=draft)
        assert torch.equal(exit_tokens, shallow.generate(prompts, 10, temperature=0.0))
    assert torch.equal(wrapper.generate(prompts, 10, temperature=0.0, exit_layer=4), wanted)
    both = wrapper.generate(prompts, 10, temperature=0.0, exit_layer=3, draft_layers=1)
    assert torch.equal(both, wrapper.generate(prompts, 10, temperature=0.0, exit_layer=3))
    streamed = list(wrapper.stream(prompts, 10, temperature=0.0, draft_layers=2))
    assert torch.equal(torch.stack(streamed, dim=-1), wanted)


def test_guesses_keep_the_distribution() -> None:
    """The second token of many rows is distributed as without guesses."""
    torch.manual_seed(2)
    wrapper, prompt = AutoregressiveWrapper(model_of()), tokens(1, 5).expand(3000, -1)
    given = {"filter_logits_fn": "top_k", "filter_kwargs": {"k": 4}, "temperature": 1.5}
    shares = [
        wrapper.generate(prompt, 3, **given, **how).flatten().bincount(minlength=24) / 9000
        for how in ({}, {"draft_layers": 1, "draft_tokens": 2})
    ]
    assert (shares[0] - shares[1]).abs().max() < 0.03


@pytest.mark.parametrize("options", [{}, {"shift_tokens": 1}], ids=str)
def test_memories_of_all_blocks_serve_the_first_ones(options: dict[str, Any]) -> None:
    model = model_of(max_mem_len=8, **options)
    past, x = tokens(2, 6), tokens(2, 5)
    mems = model(past, return_mems=True)[1]
    wrapper = AutoregressiveWrapper(model)
    wanted = wrapper.generate(x, 8, temperature=0.0, mems=mems)
    assert torch.equal(wrapper.generate(x, 8, temperature=0.0, mems=mems, draft_layers=2), wanted)


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit_layers": (0, 1)}, "counted from 1, in ascending order"),
        ({"exit_layers": (2, 1)}, "in ascending order"),
        ({"exit_layers": ()}, "in ascending order"),
        ({"exit_layers": (5,)}, "the stack runs 4 blocks"),
        ({"exit_layers": (1,), "exit_norms": True, "pre_norm_has_final_norm": False}, "copies of the final norm"),
        ({"exit_layers": (1,), "recycling": True}, "`recycling` runs it several times"),
        ({"exit_layers": (1,), "looped": True, "pre_and_post_norm": True}, "`looped` runs it several times"),
    ],
    ids=str,
)
def test_models_without_such_exits(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BASE.build(depth=4, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit_loss_weights": "half"}, r"`exit_loss_weights` is 'half'; it must be one of"),
        ({"exit_loss_weights": (1.0, 2.0)}, "must hold 3 numbers"),
        ({"exit_loss_weights": (1.0, 2.0, 0.0)}, "the last is above 0"),
        ({"exit_loss_scale": -1.0}, "must not be negative"),
        ({"exit_loss_every": 0}, "a number of steps"),
    ],
    ids=str,
)
def test_losses_of_exits(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AutoregressiveWrapper(model_of(), **options)


@pytest.mark.parametrize("options", [{"exit_loss_weights": "equal"}, {"exit_loss_scale": 0.5}, {"exit_loss_every": 2}])
def test_losses_need_exits(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is for a `net` with exits"):
        AutoregressiveWrapper(model_of(exits=None), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit_layer": 5}, "between 1 and 4"),
        ({"exit_layer": 0}, "at least 1"),
        ({"draft_layers": 4}, "fewer than the 4 that run"),
        ({"draft_layers": 2, "prompt_lookup": 2}, "`draft_layers` and `prompt_lookup` both guess"),
        ({"draft_layers": 2, "exit_layer": 2}, "guesses need fewer blocks"),
        ({"draft_layers": 2, "compile": True}, "reads one token at a time"),
        ({"exit_layer": 2, "compile": True}, "makes another one at each call"),
        ({"exit_layer": 2, "layers_execute_order": (0, 1)}, "counts the blocks as the stack runs them"),
    ],
    ids=str,
)
def test_generations(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AutoregressiveWrapper(model_of()).generate(tokens(1, 4), 3, **options)


def test_models_that_cannot_be_shallow() -> None:
    stack = {"dim": 16, "depth": 4, "heads": 2, "verbose": False}
    for layers, words in (
        (Decoder(**stack, unet_skips=True), "the second half reads the first"),
        (PrefixDecoder(**stack), "a PrefixDecoder cannot have"),
    ):
        model = TransformerWrapper(num_tokens=24, max_seq_len=32, attn_layers=layers)
        with pytest.raises(InputError, match=words):
            model.shallow(2)
    for count in (0, 4, -1, True, "2"):
        with pytest.raises(InputError):
            model_of().shallow(count)


def test_outputs_that_a_pass_cannot_have() -> None:
    x = tokens(2, 5)
    for model, given, words in (
        (model_of(exits=None), {"return_exits": True}, r"has the exits \(\)"),
        (model_of(), {"return_exits": (2,)}, r"`return_exits` is \(2,\)"),
        (model_of(), {"return_exits": True, "layers_execute_order": (0, 1)}, "this pass runs 1 blocks"),
        (model_of(), {"exits": {1: None}}, "pass `return_exits = True`"),
    ):
        with pytest.raises(InputError, match=words):
            model(x, **given)
    with pytest.raises(StateDictError, match="the reference has no exits"):
        model_of(exit_norms=True).export_reference_state_dict()
    model_of().export_reference_state_dict()


def test_self_speculation_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a size that takes a moment; the benchmark itself compares the tokens."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    benchmark = importlib.import_module("benchmarks.self_speculation")
    small = "--seconds 0.1 --dim 64 --depth 2 --exit 1 --new 8 --prompts 1 --guesses 2"
    benchmark.main(small.split())
    assert re.search(r"2 guesses: +[\d.]+ tokens a second", capsys.readouterr().out)
