"""Models whose logits are not finite, and temperatures near zero, in every method that chooses tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import perturb
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers import nonautoregressive_wrapper as masked_tokens
from x_transformers.autoregressive_wrapper import gumbel_sample
from x_transformers.decoding import sampling, speculative, watch
from x_transformers.errors import InputError, NotFiniteError

VOCABULARY, LENGTH, NEW = 12, 16, 5
STACK = {"dim": 16, "depth": 1, "heads": 2, "verbose": False}
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Off(nn.Module):
    """Adds a value to the logits of one token, in one row of the batch, from one pass on."""

    def __init__(
        self, head: nn.Module, value: float = 0.0, token: int | slice = 7, row: int = 1, calls: int = 0
    ) -> None:
        super().__init__()
        self.head, self.value, self.token, self.row, self.left = head, value, token, row, calls

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x).clone()
        self.left -= 1
        if self.left < 0:
            logits[min(self.row, len(logits) - 1), ..., self.token] += self.value
        return logits


def causal(**off: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    net = perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=Decoder(**STACK)), 0.3)
    net.to_logits = Off(net.to_logits, **off)
    return net.eval()


def expert(**options: Any) -> Callable[..., Tensor]:
    def run(temperature: float, **off: Any) -> Tensor:
        return AutoregressiveWrapper(causal(**off)).generate(PROMPT, NEW, temperature=temperature, **options)

    return run


def streamed(temperature: float, **off: Any) -> Tensor:
    return torch.stack([*AutoregressiveWrapper(causal(**off)).stream(PROMPT, NEW, temperature=temperature)], dim=-1)


def stochastic_beams(temperature: float, **off: Any) -> Tensor:
    return AutoregressiveWrapper(causal(**off)).beam_search(PROMPT, NEW, temperature=temperature, stochastic=True)


def segments(temperature: float, **off: Any) -> Tensor:
    return XLAutoregressiveWrapper(causal(**off)).generate(PROMPT, NEW, temperature=temperature)


def belief(temperature: float, **off: Any) -> Tensor:
    net = causal()
    torch.manual_seed(1)
    model = BeliefStateWrapper(net)
    model.text_head = Off(model.text_head, **off)
    return model.generate_with_suffix_cond(PROMPT, NEW, temperature=temperature)


def filling(temperature: float, **off: Any) -> Tensor:
    torch.manual_seed(0)
    net = perturb(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=Encoder(**STACK)), 0.3)
    net.to_logits = Off(net.to_logits, **off)
    return NonAutoregressiveWrapper(net, mask_id=0, steps=4).generate(2, start_temperature=temperature)


def numbers(temperature: float, **off: Any) -> Tensor:
    torch.manual_seed(0)
    layers = Decoder(**STACK)
    net = XValTransformerWrapper(num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=LENGTH, attn_layers=layers)
    perturb(net, 0.3).to_logits = Off(net.to_logits, **off)
    model = XValAutoregressiveWrapper(net)
    return model.generate(PROMPT, torch.ones(2, 3), NEW, temperature=temperature).sampled_token_ids


METHODS: dict[str, Callable[..., Tensor]] = {
    "generate": expert(),
    "nucleus": expert(filter_logits_fn="top_p"),
    "min_p": expert(filter_logits_fn="min_p"),
    "top_a": expert(filter_logits_fn="top_a", filter_before_temperature=True),
    "without a cache": expert(cache_kv=False),
    "static cache": expert(cache="static"),
    "compiled": expert(compile={"disable": True}),  # the loop of compiled steps, without the seconds of graphs
    "with an amateur": expert(amateur_model=causal()),
    "with a draft model": expert(draft_model=causal()),
    "with prompt lookup": expert(prompt_lookup=2),
    "until an end": expert(eos_token=11),
    "stream": streamed,
    "stochastic beams": stochastic_beams,
    "segments": segments,
    "belief states": belief,
    "masked tokens": filling,
    "numbers": numbers,
}


@pytest.fixture(params=["at once", "later"])
def _looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at once, as on a CPU, or as rarely as on an accelerator."""
    if request.param == "later":
        monkeypatch.setattr(watch, "costs_nothing", lambda device: False)
        for module in (sampling, speculative):
            monkeypatch.setattr(module, "draw_from", sampling.exponential_race)


FAULTS = {"NaN": math.nan, "infinity": math.inf}


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(name: str, fault: str, temperature: float) -> None:
    with pytest.raises(NotFiniteError, match=f"the model returned {fault} as logits .in row 1"):
        METHODS[name](temperature, value=FAULTS[fault])


@pytest.mark.parametrize("name", ["generate", "with a draft model", "stochastic beams", "static cache"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_faults_in_the_middle_of_a_text_are_reported(name: str, temperature: float) -> None:
    with pytest.raises(NotFiniteError, match="the model returned NaN"):
        METHODS[name](temperature, value=math.nan, calls=1)


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_token_is_reported(temperature: float) -> None:
    for method in (METHODS["generate"], METHODS["segments"], METHODS["masked tokens"]):
        with pytest.raises(NotFiniteError, match="minus infinity for each token"):
            method(temperature, value=-math.inf, token=slice(None))
    model = AutoregressiveWrapper(causal(value=-math.inf, token=slice(None)))
    with pytest.raises(NotFiniteError, match="minus infinity for each token"):
        model.beam_search(PROMPT, NEW)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_may_exclude_tokens(name: str, temperature: float) -> None:
    assert METHODS[name](temperature, value=-math.inf)[1].ne(7).all()


@pytest.mark.usefixtures("_looks")
def test_plain_beams_report_too() -> None:
    with pytest.raises(NotFiniteError, match="the model returned infinity"):
        AutoregressiveWrapper(causal(value=math.inf)).beam_search(PROMPT, NEW)


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_message_says_whose_logits_they_are(temperature: float) -> None:
    model, other = AutoregressiveWrapper(causal()), causal(value=math.nan)
    given: dict[str, Any] = {"seq_len": NEW, "temperature": temperature}
    with pytest.raises(NotFiniteError, match="an amateur returned NaN"):
        model.generate(PROMPT, amateur_model=other, **given)
    with pytest.raises(NotFiniteError, match="`draft_model` returned NaN"):
        model.generate(PROMPT, draft_model=other, **given)


def test_a_critic_is_watched() -> None:
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=Encoder(**STACK))
    model = NonAutoregressiveWrapper(net, mask_id=0, steps=4, self_token_critic=True)
    model.token_critic.to_logits.bias.data.fill_(math.nan)
    with pytest.raises(NotFiniteError, match="the critic returned NaN"):
        model.generate(2)


@pytest.mark.parametrize("left", [math.nan, -math.inf])
def test_filters_that_leave_nothing_are_reported(left: float) -> None:
    with pytest.raises(NotFiniteError, match="`filter_logits_fn`"):
        AutoregressiveWrapper(causal()).generate(PROMPT, NEW, filter_logits_fn=lambda logits: logits * 0 + left)


def test_the_fault_is_one_of_ours_and_of_python() -> None:
    assert issubclass(NotFiniteError, (InputError, FloatingPointError))
    assert issubclass(NotFiniteError, FloatingPointError)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"compiled"}))
@pytest.mark.parametrize("temperature", [1e-6, 1e-7, 1e-30, 1e-40, 5e-324])
def test_low_temperatures_are_greedy(name: str, temperature: float) -> None:
    greedy = METHODS[name](0.0)
    for seed in range(2):
        torch.manual_seed(seed)
        assert torch.equal(METHODS[name](temperature), greedy)


def test_low_temperatures_of_vectors_are_their_means() -> None:
    torch.manual_seed(0)
    layers = Decoder(**STACK)
    net = ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=LENGTH, probabilistic=True, attn_layers=layers)
    model = ContinuousAutoregressiveWrapper(net)
    prompt = torch.randn(2, 3, 3)
    assert torch.equal(model.generate(prompt, 4, temperature=1e-30), model.generate(prompt, 4, temperature=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-12, 1e-45, 5e-324])
@pytest.mark.parametrize("sample", [gumbel_sample, masked_tokens.gumbel_sample])
def test_samplers_take_the_largest_logit(dtype: torch.dtype, temperature: float, sample: Callable[..., Tensor]) -> None:
    logits = torch.stack([torch.randperm(50) for _ in range(20)]).to(dtype) / 8
    assert torch.equal(sample(logits, temperature), logits.argmax(dim=-1))
