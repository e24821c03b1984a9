"""Numbers of public implementations of token mixers: operators through their functions, layers through `mixer`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from x_transformers import Decoder, Encoder
from x_transformers.mixers.linear_attention import HedgehogMap
from x_transformers.recurrences import naive
from x_transformers.recurrences.convolution import long_convolution, long_convolution_2d
from x_transformers.recurrences.delta import delta
from x_transformers.recurrences.groups import Grouped, left_to_right
from x_transformers.recurrences.linear import linear, linear_with_bonus
from x_transformers.recurrences.log_linear import log_linear
from x_transformers.recurrences.loop import loop
from x_transformers.recurrences.partitions import Reads, partitioned
from x_transformers.recurrences.rank_one import rank_one
from x_transformers.recurrences.scan import scan
from x_transformers.recurrences.stabilized import stabilized, weighted_mean

FOLDER = Path(__file__).with_name("golden") / "mixers"
CLOSE, EXACT = 2e-5, 1e-10
LESS_CLOSE = {"layer-hyena": 5e-5}
"""Sines of sines enlarge the rounding of positions."""
BOTH_WAYS = {"layer-mossformer", "layer-mossformer-rotary", "layer-fsmn", "layer-shallow"}
"""Cases of passes over whole rows that are not of grids."""

Case = dict[str, Tensor]

ELSEWHERE = {"layer-rwkv4-channel", "layer-rwkv7-1", "layer-prepbn"}
"""Cases in `tests/test_channel_mix.py`, `tests/test_rwkv7.py` and `tests/test_prepbn.py`."""

OMITTED: dict[str, dict[str, Any]] = {
    "layer-omega": {"mixer_muon_steps": 0},
    "layer-titans-deep": {"mixer_qk_norm": "none"},
    "layer-titans-residual": {"mixer_qk_norm": "none"},
    "layer-atlas-muon": {"mixer_omega_window": 1, "mixer_feature_degree": 1, "mixer_qk_norm": "none"},
}
"""Options that a case does without, and its keywords do not name."""

LAYERS = sorted({path.stem for path in FOLDER.glob("layer-*.safetensors")} - ELSEWHERE)


def read(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, dict[str, str]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        keys = file.keys()
        tensors = {key: file.get_tensor(key) for key in keys}
        metadata = file.metadata() or {}
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}, metadata


def agree(mine: Tensor, theirs: Tensor, close: float = CLOSE) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= close * (1 + theirs.abs().max())


def test_every_case_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == ELSEWHERE | set(LAYERS) | set(OPERATORS)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    case, metadata = read(name)
    keywords: dict[str, Any] = json.loads(metadata["keywords"]) | OMITTED.get(name, {})
    causal = keywords.pop("causal", name not in BOTH_WAYS and "mixer_grid" not in keywords)
    x = case["input.x"]
    stack = (Decoder if causal else Encoder)(dim=x.shape[-1], depth=1, only_attn=True, verbose=False, **keywords)
    mixer = stack.layers[0].mixer
    mixer.load_state_dict({key.removeprefix("state."): t for key, t in case.items() if key.startswith("state.")})
    if "input.live" in case:
        live = case["input.live"].bool()
        out = mixer(x, live, causal=causal)[0]
        for row, own in enumerate(live):
            agree(out[row, own], case[f"output.{row}"][0] if f"output.{row}" in case else case["output"][row, own])
        return
    out, close = mixer(x, causal=causal)[0], LESS_CLOSE.get(name, CLOSE)
    agree(out, case["output"], close)
    if causal:
        n = x.shape[1]
        state, parts = None, []
        for piece in (slice(0, 5), slice(5, 6), slice(6, n)):
            y, state = mixer(x[:, piece], state=state)
            parts.append(y)
        agree(torch.cat(parts, dim=1), case["output"], close)


@pytest.mark.parametrize("name", ["layer-titans", "layer-omega"])
@torch.no_grad()
def test_memories(name: str) -> None:
    """The memory after the last token, and the rule whose chunks are single tokens."""
    case, metadata = read(name)
    keywords = json.loads(metadata["keywords"]) | OMITTED.get(name, {})
    weights = {key.removeprefix("state."): t for key, t in case.items() if key.startswith("state.")}
    for chunk in (keywords["mixer_chunk"], 1):
        own = keywords | {"mixer_chunk": chunk}
        mixer = Decoder(dim=16, depth=1, only_attn=True, verbose=False, **own).layers[0].mixer
        mixer.load_state_dict(weights)
        out, state = mixer(case["input.x"])
        agree(out, case["output" if chunk > 1 else "output.online"])
        if chunk > 1:
            agree(state["memory"].unflatten(-1, (8, 8)).flatten(0, 1).mT, case["output.memory"])


# Operators: each returns the function and its arguments, as the spec of the case has them.

Operator = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]], list[Tensor | None]]


def of_decay(case: Case) -> Operator:
    q = case["input.q"] * case["input.q"].shape[-1] ** -0.5
    k, v, g, state = (case.get(f"input.{name}") for name in ("k", "v", "log_decay", "state"))
    return linear, naive.linear, [q, k, v, g, state]


def of_retention(case: Case) -> Operator:
    function, twin, (q, k, v, _, state) = of_decay(case)
    assert q is not None
    heads, n = q.shape[1], q.shape[2]
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=q.dtype))))
    return function, twin, [q, k, v, g[:, None].expand(q.shape[0], heads, n), state]


def of_state_space(case: Case) -> Operator:
    heads = case["input.x"].shape[2]
    step = F.softplus(case["input.step"] + case["input.step_bias"]).mT
    b, c = (case[f"input.{name}"].transpose(1, 2).repeat_interleave(heads // 2, dim=1) for name in "bc")
    x = case["input.x"].transpose(1, 2)
    skip = case["input.skip"].view(-1, 1, 1)
    arguments = [c, b, x * step.unsqueeze(-1), step * case["input.a"].view(-1, 1), case["input.state"].mT]

    def read_as_source(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            out, state = run(*given)
            return (out + skip * x).transpose(1, 2), state.mT

        return whole

    return read_as_source(linear), read_as_source(naive.linear), arguments  # type: ignore[return-value]


def of_hedgehog(case: Case) -> Operator:
    maps = {}
    for name in "qk":
        maps[name] = HedgehogMap(8, None).to(case["input.q"].dtype)
        maps[name].load_state_dict({part: case[f"state.map_{name}.{part}"] for part in ("weight", "bias")})
        agree(maps[name](case[f"input.{name}"]), case[f"output.{name}"])

    def divided(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            out, state = run(*given)
            return out[..., :-1] / (out[..., -1:] + 1e-10), state

        return whole

    q, k = (maps[name](case[f"input.{name}"]) for name in "qk")
    v = F.pad(case["input.v"], (0, 1), value=1.0)
    return divided(linear), divided(naive.linear), [q, k, v, None, None]


def of_delta(case: Case) -> Operator:
    q = case["input.q"] * case["input.q"].shape[-1] ** -0.5
    k, v, beta, g, state = (case.get(f"input.{name}") for name in ("k", "v", "beta", "log_decay", "state"))
    return delta, naive.delta, [q, k, v, beta, g, state]


def of_products(case: Case) -> Operator:
    """Two writes a token: decay at the first, read at the second."""
    zeros = torch.zeros_like
    q, g = case["input.q"], case["input.log_decay"]
    q = torch.stack((zeros(q), q), dim=3).flatten(2, 3)
    g = torch.stack((g, zeros(g)), dim=3).flatten(2, 3)

    def at_last(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            out, state = run(*given)
            return out[:, :, 1::2], state

        return whole

    arguments = [q, case["input.k"], case["input.v"], case["input.beta"], g, None]
    return at_last(delta), at_last(naive.delta), arguments  # type: ignore[return-value]


def of_bonus(case: Case) -> Operator:
    q = case["input.q"] * case["input.q"].shape[-1] ** -0.5
    names = ("k", "v", "log_decay", "bonus", "state")
    return linear_with_bonus, naive.linear_with_bonus, [q, *(case[f"input.{name}"] for name in names)]


def of_rank_one(case: Case) -> Operator:
    q = case["input.q"] * case["input.q"].shape[-1] ** -0.5
    names = ("k", "v", "a", "b", "log_decay", "state")
    return rank_one, naive.rank_one, [q, *(case[f"input.{name}"] for name in names)]


def of_cell(case: Case) -> Operator:
    """Inputs with their biases; that of the candidate of a GRU is a bias only."""
    name, x = CELL_OF[case["input.x"].shape[2], case["output"].shape[2]], case["input.x"]
    x = F.pad(x, (0, 0, 0, 0, case["input.bias"].shape[0] - x.shape[2], 0)) + case["input.bias"]

    def twin(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        return naive.loop(*given, cell=name)  # type: ignore[arg-type]

    return lambda *given: loop(name, *given), twin, [x, case["input.recurrent"], None, None]


CELL_OF = {(1, 1): "elman", (3, 1): "gru", (4, 2): "lstm", (4, 4): "slstm"}
"""Networks by the numbers of their gates and states."""


def of_partitions(case: Case) -> Operator:
    def reads(suffix: str) -> list[Tensor]:
        q, k, g = (case[f"input.{name}{suffix}"] for name in ("q", "k", "log_decay"))
        return [q * q.shape[-1] ** -0.5, k, g]

    def whole(q: Tensor, k: Tensor, g: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return partitioned(Reads(q, k, g), Reads(*given[:3]), *given[3:], 2)

    def one_by_one(q: Tensor, k: Tensor, g: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """The shared recurrence and each partition by itself, where tokens that do not choose it are left out."""
        own_q, own_k, own_g, v, shares = given
        out, state = naive.linear(q, k, v, g, None)
        states, least = [state], shares.topk(2, dim=-1).values[..., -1:]
        for number in range(shares.shape[-1]):
            for_one = out.new_zeros(out.shape), out.new_zeros(state.shape)
            for b, row in enumerate(shares[..., number] >= least[..., 0]):
                e = shares[b : b + 1, row, number][:, None, :, None]
                mine = (t[b : b + 1, :, row] for t in (own_q, own_k, v, own_g))
                q_, k_, v_, g_ = mine
                for_one[0][b, :, row], for_one[1][b] = (t[0] for t in naive.linear(q_ * e, k_ * e, v_, g_, None))
            out = out + for_one[0]
            states.append(for_one[1])
        return out, torch.cat(states, dim=1)

    return whole, one_by_one, [*reads(""), *reads("_sparse"), case["input.v"], case["input.route"].softmax(dim=-1)]  # type: ignore[return-value]


def of_scan(case: Case) -> Operator:
    return scan, naive.scan, [case["input.x"], case["input.log_a"], case["input.state"]]


def of_selective_scan(case: Case) -> Operator:
    x, step, b, c, gate = (case[f"input.{name}"].mT for name in ("x", "step", "b", "c", "gate"))
    step = F.softplus(step + case["input.step_bias"]).unsqueeze(-1)
    arguments = [(step * x.unsqueeze(-1) * b.unsqueeze(-2)).flatten(2), (step * case["input.a"]).flatten(2), None]

    def read_as_source(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            h, state = (t.unflatten(-1, case["input.a"].shape) for t in run(*given))
            out = (h * c.unsqueeze(-2)).sum(dim=-1) + case["input.skip"] * x
            return (out * F.silu(gate)).mT, state

        return whole

    return read_as_source(scan), read_as_source(naive.scan), arguments  # type: ignore[return-value]


def of_exponential_gates(case: Case) -> Operator:
    q, k, v, i, f = (case[f"input.{name}"] for name in "qkvif")

    def divided(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            (numerator, denominator, top), (held, _) = run(*given)
            return numerator / (torch.maximum(denominator.abs(), (-top).exp()) + 1e-6), held

        return whole

    arguments = [q, k * k.shape[-1] ** -0.5, v, i, F.logsigmoid(f), None]
    return divided(stabilized), divided(naive.stabilized), arguments  # type: ignore[return-value]


def of_one_query(case: Case) -> Operator:
    k, v = case["input.k"], case["input.v"]
    scores = (k @ case["input.q"].unsqueeze(-1)).squeeze(-1) * k.shape[-1] ** -0.5

    def divided(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Any) -> tuple[Tensor, Tensor]:
            (numerator, denominator, _), (held, _) = run(*given)
            return numerator / denominator, held

        return whole

    ones = torch.ones_like(v[..., :1])
    return divided(stabilized), divided(naive.stabilized), [ones, ones, v, scores, None, None]  # type: ignore[return-value]


def of_fading_mean(case: Case) -> Operator:
    k, v = case["input.k"], case["input.v"]
    decay = (-case["input.decay_log"].exp()).expand_as(k)
    state = torch.stack([case[f"input.{name}"] for name in ("num", "den", "top")], dim=1)
    if "output.num" in case:
        case["output.state"] = torch.stack([case[f"output.{name}"] for name in ("num", "den", "top")], dim=1)
    return weighted_mean, naive.weighted_mean, [v, k, decay, case["input.bonus"], state]


def of_convolution(case: Case) -> Operator:
    """Convolutions have no state of their own: the past that they read is that of the caller."""

    def read(run: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *given: (run(*given), torch.zeros(0))

    arguments = [case["input.x"], case["input.filter"]]
    if "input.skip" in case:
        return read(long_convolution), read(naive.long_convolution), [*arguments, case["input.skip"]]
    return read(long_convolution_2d), read(naive.long_convolution_2d), arguments  # type: ignore[return-value]


def of_levels(case: Case) -> Operator:
    q, k, v, g, levels = (case[f"input.{name}"] for name in ("q", "k", "v", "log_decay", "levels"))

    def definition(*given: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token after the other."""
        state, parts = None, []
        for t in range(q.shape[2]):
            before = torch.full((q.shape[0], 1), float(t)) if t else None
            out, state = log_linear(*(each[:, :, t : t + 1] for each in given), state, before)
            parts.append(out)
        assert state is not None
        return torch.cat(parts, dim=2), state

    return partial(log_linear, chunk=4), definition, [q, k, v, g, levels]


def of_groups(case: Case) -> Operator:
    size = int(read("op-mossformer-causal")[1]["group"])
    features = [case[f"input.{name}"] for name in ("q_near", "q_far", "k_near", "k_far")]
    values = torch.cat((case["input.v"], case["input.u"]), dim=-1)
    case["output"] = torch.cat((case["output.v"], case["output.u"]), dim=-1)

    def whole(*given: Tensor) -> tuple[Tensor, Tensor]:
        return left_to_right(Grouped(*given), size, None, None)[0], torch.zeros(0)

    def twin(*given: Tensor) -> tuple[Tensor, Tensor]:
        return naive.grouped(*given, size, causal=True), torch.zeros(0)

    return whole, twin, [*features, values]


OPERATORS: dict[str, Callable[[Case], Operator]] = {
    "op-scalar-decay": of_decay,
    "op-vector-decay": of_decay,
    "op-retention": of_retention,
    "op-ssd": of_state_space,
    "op-hedgehog": of_hedgehog,
    "op-delta": of_delta,
    "op-gated-delta": of_delta,
    "op-vector-delta": of_delta,
    "op-delta-product": of_products,
    "op-diagonal-plus-rank-one": of_rank_one,
    **dict.fromkeys(("op-elman", "op-gru", "op-lstm", "op-slstm"), of_cell),
    "op-sparse-state": of_partitions,
    "op-rwkv6": of_bonus,
    "op-scan": of_scan,
    "op-selective-scan": of_selective_scan,
    "op-mlstm": of_exponential_gates,
    "op-aaren": of_one_query,
    "op-rwkv4": of_fading_mean,
    "op-log-linear-16": of_levels,
    "op-log-linear-19": of_levels,
    "op-mossformer-causal": of_groups,
    "op-long-convolution": of_convolution,
    "op-long-convolution-2d": of_convolution,
}


@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_operators(name: str) -> None:
    case, _ = read(name)
    function, _, arguments = OPERATORS[name](case)
    out, state = function(*arguments)
    agree(out, case["output"])
    if "output.state" in case:
        agree(state, case["output.state"])
    case, _ = read(name, torch.float64)
    function, twin, arguments = OPERATORS[name](case)
    for mine, theirs in zip(function(*arguments), twin(*arguments), strict=True):
        if mine.numel():
            agree(mine, theirs, EXACT)


def test_filters_of_hyena() -> None:
    case, metadata = read("layer-hyena")
    mixer = Decoder(dim=16, depth=1, only_attn=True, verbose=False, **json.loads(metadata["keywords"])).layers[0].mixer
    mixer.load_state_dict({key.removeprefix("state."): t for key, t in case.items() if key.startswith("state.")})
    agree(mixer.filter(19)[0], case["output.filters"], LESS_CLOSE["layer-hyena"])
    agree(mixer.filter.positions, case["output.positions"])


def test_matrices_of_legendre_memories() -> None:
    case, metadata = read("layer-lmu")
    memory = Decoder(dim=16, depth=1, verbose=False, **json.loads(metadata["keywords"])).layers[0].mixer.memory
    agree(memory.a, case["output.memory_a"])
    agree(memory.b.unsqueeze(-1), case["output.memory_b"])
