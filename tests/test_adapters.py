"""Adapters of `peft` on models of ours: LoRA learns, decodes with a cache, and merges into the weights exactly."""

import copy
from typing import Any

import pytest
import torch
from catalog import perturb
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

peft = pytest.importorskip("peft", reason="needs the extra `peft`")

ATTENTION = ["q", "k", "v", "out"]
EVERY_MAP = [*ATTENTION, "up", "down"]


def base(tied: bool = True, **options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    stack = Decoder(
        dim=32, depth=2, heads=4, attn_dim_head=8, attn_kv_heads=2, rotary_pos_emb=True, ff_glu=True, verbose=False
    )
    model = TransformerWrapper(num_tokens=20, max_seq_len=32, tie_embedding=tied, attn_layers=stack, **options)
    return perturb(model, 0.3).eval()


def adapted(model: nn.Module, targets: list[str] | str, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def ids(batch: int = 2, n: int = 9) -> Tensor:
    return torch.randint(0, 20, (batch, n))


@pytest.mark.parametrize("targets", [ATTENTION, EVERY_MAP, "all-linear"], ids=["attention", "every map", "all linear"])
@torch.no_grad()
def test_adapters_merge_exactly(targets: list[str] | str) -> None:
    plain, x = base(), ids()
    before, names = plain(x), plain.state_dict().keys()
    model = adapted(copy.deepcopy(plain), targets).eval()
    with_adapters = model(x)
    assert (with_adapters - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    merged = model.merge_and_unload()
    assert type(merged) is TransformerWrapper
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(merged(x), with_adapters, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_weights_are_the_sum() -> None:
    plain = base()
    model = adapted(copy.deepcopy(plain), ATTENTION)
    layer = model.base_model.model.attn_layers.layers[0].attention.projections.q
    wanted = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    merged = model.merge_and_unload()
    assert torch.equal(merged.attn_layers.layers[0].attention.projections.q.weight, wanted)


def test_only_adapters_learn() -> None:
    model = adapted(AutoregressiveWrapper(base()), EVERY_MAP).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    x = ids()
    first = model(x)
    for _ in range(5):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first  # type: ignore[possibly-undefined]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("targets", [ATTENTION, EVERY_MAP, [*EVERY_MAP, "token_emb.emb"]], ids=len)
@torch.no_grad()
def test_decoding_runs_the_adapters(targets: list[str]) -> None:
    """Generation packs maps into one: with adapters it must not, and tied logits follow the adapted table."""
    net = adapted(base(), targets).eval()
    wrapper, prompt = AutoregressiveWrapper(net.base_model.model), ids(2, 4)
    with_cache = wrapper.generate(prompt, 12, temperature=0.0)
    without = prompt
    for _ in range(12):
        without = torch.cat((without, net(without)[:, -1].argmax(dim=-1, keepdim=True)), dim=-1)
    assert torch.equal(with_cache, without[:, 4:])
    plain = AutoregressiveWrapper(base()).generate(prompt, 12, temperature=0.0)
    assert not torch.equal(plain, with_cache)
    merged = AutoregressiveWrapper(net.merge_and_unload()).generate(prompt, 12, temperature=0.0)
    assert torch.equal(merged, with_cache)


def test_saved_adapters(tmp_path: Any) -> None:
    """Adapters have files of their own; merged models are saved as any other."""
    plain, x = base(tied=False), ids()
    model = adapted(copy.deepcopy(plain), EVERY_MAP).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(TransformerWrapper.from_pretrained(tmp_path / "merged")(x), merged(x))
