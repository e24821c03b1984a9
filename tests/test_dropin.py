"""What other people's packages do with `x_transformers`, as small scripts: each gives what one plain pass gives.

`python -m tests.downstream` runs the packages themselves.
"""

import copy
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from downstream.__main__ import refuse_other_providers
from downstream.packages import PACKAGES, STAGES
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
)
from x_transformers.autoregressive_wrapper import eval_decorator, top_k, top_p
from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder
from x_transformers.x_transformers import Attention, AttentionLayers, FeedForward, RMSNorm, RotaryEmbedding

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming-from-x-transformers.md"
D: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "verbose": False}
B, N, VOCAB = 3, 8, 16
STACKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True},
    "polar": {"polar_pos_emb": True, "use_rmsnorm": True},
    "value residual": {"rotary_pos_emb": True, "add_value_residual": True, "learned_value_residual_mix": True},
    "residual streams": {"rotary_pos_emb": True, "num_residual_streams": 2, "ff_glu": True, "attn_num_mem_kv": 2},
    "grouped": {"rotary_pos_emb": True, "attn_kv_heads": 1, "attn_qk_norm": True},
}
EVERY_STACK = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)


def decoder(**options: Any) -> Decoder:
    return perturb(Decoder(**{**D, **options})).eval()


def language_model(**options: Any) -> TransformerWrapper:
    return perturb(TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=Decoder(**{**D, **options}))).eval()


# A world model over the frames of a video: its own rotary table, tokens in front, the wrapped stack asked for its width


class WithMetaTokens(nn.Module):
    def __init__(self, fn: nn.Module, count: int) -> None:
        super().__init__()
        self.fn = fn
        self.meta_tokens = nn.Parameter(torch.randn(count, fn.dim))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        meta = self.meta_tokens.expand(len(x), -1, -1)
        return self.fn(torch.cat((meta, x), dim=1), **kwargs)[:, len(self.meta_tokens) :]


@torch.no_grad()
def test_a_rotary_table_of_the_caller() -> None:
    """Every frame has four tokens at one position, and tokens in front are at position -1."""
    stack, x = decoder(), torch.randn(B, N, 32)
    positions = F.pad(torch.arange(N // 4).repeat_interleave(4), (2, 0), value=-1)
    angles, scale = RotaryEmbedding(dim=8)(positions)
    model = WithMetaTokens(stack, 2)
    out = model(x[:, :-1], rotary_pos_emb=(angles[:, :-1], scale))  # the last token is only a label
    own = decoder(rotary_pos_emb=True, rotary_emb_dim=8)
    own.load_state_dict(stack.state_dict(), strict=False)
    with_positions = WithMetaTokens(own, 2)
    with_positions.meta_tokens = model.meta_tokens
    close(out, with_positions(x[:, :-1], pos=positions[:-1]))


# A trainer that looks keywords up in signatures, and tries again without those that raise a TypeError


def build_from_signature(wanted: dict[str, Any]) -> Encoder:
    listed = set(inspect.signature(AttentionLayers.__init__).parameters)
    return Encoder(**D, **{name: value for name, value in wanted.items() if name in listed})


def test_keywords_are_found_in_signatures() -> None:
    encoder = build_from_signature({"rotary_pos_emb": True, "attn_flash": True, "no_such_keyword": 1})
    assert encoder.rotary_pos_emb is not None
    assert {"flash", "heads", "dim_head"} <= set(inspect.signature(Attention.__init__).parameters)
    assert {"glu", "mult", "dropout"} <= set(inspect.signature(FeedForward.__init__).parameters)
    model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=N, attn_layers=encoder)
    ids = torch.arange(N)[None]
    masked = model(ids, mask=torch.ones_like(ids).bool())
    assert not torch.allclose(masked.flip(1), model(ids.flip(1)), atol=1e-3), "the model has no positions"


def test_an_unknown_keyword_is_a_type_error() -> None:
    try:
        stack = Encoder(**D, rotary_pos_emb=True, no_such_keyword=1)
    except TypeError:
        stack = Encoder(**D, rotary_pos_emb=True)
    assert stack.rotary_pos_emb is not None


# An agent: one new observation a step, no flag


@EVERY_STACK
@torch.no_grad()
def test_a_stack_that_reads_one_new_token_a_step(options: dict[str, Any]) -> None:
    stack, x = decoder(**options), torch.randn(B, N, 32)
    assert (stack.attn_heads, stack.attn_dim_head) == (2, 16)
    whole, cache, steps = stack(x, condition=None), None, []
    for token in x.split(1, dim=1):
        out, cache = stack(token, condition=None, cache=cache, return_hiddens=True)
        steps.append(out)
    close(torch.cat(steps, dim=1), whole)


@torch.no_grad()
def test_two_stacks_with_a_cache_each() -> None:
    """The upper one reads what a controller has made of the output of the lower one."""
    lower, upper = decoder(polar_pos_emb=True, pre_norm_has_final_norm=False), decoder(polar_pos_emb=True)
    control, x = nn.Linear(32, 32), torch.randn(B, N, 32)
    embeds = lower(x)
    whole = upper(embeds + control(embeds))
    caches: tuple[Any, Any] = (None, None)
    for i in range(N):
        embed, below = lower(x[:, i : i + 1], cache=caches[0], return_hiddens=True)
        out, above = upper(embed + control(embed), cache=caches[1], return_hiddens=True)
        caches = below, above
        close(out, whole[:, i : i + 1])


# Chunks of a sequence: in some steps, a row has no new token. Rows are kept at the right end of the cache


def right_aligned(cache: Any, mask: Tensor) -> Tensor:
    """Move the valid keys and values of each row to the end; return the moved mask."""
    order = mask.long().argsort(dim=-1, stable=True)
    for record in cache.attn_intermediates:
        keys, values = record.cached_kv
        places = order[:, None, :, None].expand_as(keys)
        record.cached_kv = keys.gather(2, places), values.gather(2, places)
    return mask.gather(1, order)


@pytest.mark.parametrize(
    "options", [STACKS["plain"], STACKS["rotary"], STACKS["grouped"]], ids=("plain", "rotary", "grouped")
)
@torch.no_grad()
def test_rows_that_grow_at_different_steps(options: dict[str, Any]) -> None:
    stack, x = decoder(**options), torch.randn(B, N, 32)
    new = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]]).bool()
    cache, held, outputs = None, torch.empty(B, 0, dtype=torch.bool), []
    for i in range(N):
        start = (~held).sum(dim=-1)
        held = torch.cat((held, new[:, i : i + 1]), dim=-1)
        out, cache = stack(
            x[:, i : i + 1],
            mask=new[:, i : i + 1],
            cache=cache,
            return_hiddens=True,
            self_attn_kv_mask=held,
            seq_start_pos=start,
            input_not_include_cache=True,
        )
        outputs.append(out)
        held = right_aligned(cache, held)
    got = torch.cat(outputs, dim=1)
    for row in range(B):
        kept = new[row]
        close(got[row : row + 1, kept], stack(x[row : row + 1, kept]))


# A hierarchy: a stack runs many short sequences at once, and goes on with the last one of each


@pytest.mark.parametrize(
    "options",
    [STACKS["plain"], STACKS["rotary"], {"num_residual_streams": 2, "ff_glu": True, "attn_num_mem_kv": 2}],
    ids=("plain", "rotary", "streams"),
)
@pytest.mark.parametrize("cross", [False, True], ids=("self", "cross"))
@torch.no_grad()
def test_a_cache_that_is_cut_to_the_last_sequence(options: dict[str, Any], cross: bool) -> None:
    groups, length, k = 4, 6, 3
    stack = decoder(cross_attend=cross, cross_attn_num_mem_kv=1 if cross else 0, **options)
    x, context = torch.randn(B, groups, length, 32), torch.randn(B, 5, 32)

    def around(rows: int) -> dict[str, Tensor]:
        return {"context": context.repeat_interleave(rows, dim=0)} if cross else {}

    _, cache = stack(x.flatten(0, 1), return_hiddens=True, **around(groups))
    for record in cache.attn_intermediates:
        keys, values = (t.unflatten(0, (B, groups))[:, -1] for t in record.cached_kv)
        if record.layer_type == "a":
            keys, values = keys[:, :, : k + keys.shape[2] - length], values[:, :, : k + values.shape[2] - length]
        record.cached_kv = keys, values
    last = x[:, -1]
    whole = stack(last, **around(1))
    out, cache = stack(last[:, : k + 1], cache=cache, return_hiddens=True, **around(1))
    close(out[:, -1], whole[:, k])
    out, _ = stack(last[:, : k + 2], cache=cache, return_hiddens=True, **around(1))
    close(out[:, -1], whole[:, k + 1])


class Sampler(nn.Module):
    """Sampling by hand, with the helpers of the autoregressive wrapper."""

    def __init__(self, net: TransformerWrapper) -> None:
        super().__init__()
        self.net = net
        self.mlp = nn.Sequential(RMSNorm(VOCAB), FeedForward(VOCAB, glu=True, dropout=0.5))

    @eval_decorator
    @torch.no_grad()
    def generate(
        self, ids: Tensor, steps: int, cached: bool, filter_logits_fn: Any = top_k, **filter_kwargs: Any
    ) -> Tensor:
        assert not self.training
        cache = None
        for _ in range(steps):
            logits, new = self.net(ids, cache=cache if cached else None, return_intermediates=True)
            cache = new
            logits = filter_logits_fn(logits[:, -1] + self.mlp(logits[:, -1]), **filter_kwargs)
            ids = torch.cat((ids, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
        return ids


@pytest.mark.parametrize("options", [{}, {"filter_logits_fn": top_p, "thres": 0.8}], ids=("top_k", "top_p"))
def test_a_sampling_loop_of_the_caller(options: dict[str, Any]) -> None:
    model, ids = Sampler(language_model(**STACKS["residual streams"])).train(), torch.randint(0, VOCAB, (B, 3))
    results = []
    for cached in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, 6, cached, **options))
    assert model.training
    assert torch.equal(*results)


# A mask over keys that changes from step to step, and only the newest token


@pytest.mark.parametrize("name", ["plain", "rotary", "residual streams"])
@torch.no_grad()
def test_masks_over_keys_change_from_step_to_step(name: str) -> None:
    """Each step sees the keys of its own mask; in training these are the rows of one mask."""
    net, prompt, total = language_model(**STACKS[name]), torch.randint(0, VOCAB, (B, 4)), 10
    assert net.can_cache_kv
    visible = (torch.rand(B, total, total) > 0.4) | torch.eye(total, dtype=torch.bool)
    visible[:, : prompt.shape[1]] = visible[:, prompt.shape[1] - 1, None]  # one pass over the prompt, with one mask
    visible[..., 0] = True
    ids, cache, outputs = prompt, None, []
    for length in range(prompt.shape[1], total + 1):
        x = ids if cache is None else ids[:, -1:]
        mask = visible[:, length - 1, :length]
        logits, cache = net(x, cache=cache, return_intermediates=True, self_attn_kv_mask=mask)
        outputs.append(logits)
        ids = torch.cat((ids, logits[:, -1:].argmax(dim=-1)), dim=1)
    close(torch.cat(outputs, dim=1), net(ids[:, :-1], attn_mask=visible[:, None]))


@torch.no_grad()
def test_one_mask_for_all_steps() -> None:
    """Keys that no step may see: steps, and one pass with the mask, are the same."""
    for options in (STACKS["plain"], STACKS["rotary"]):
        net, ids = language_model(**options), torch.randint(0, VOCAB, (B, N))
        visible = torch.ones(B, N, dtype=torch.bool)
        visible[:, 1:3] = False
        whole, cache = net(ids, self_attn_kv_mask=visible), None
        for i in range(3, N):
            x = ids[:, : i + 1] if cache is None else ids[:, i : i + 1]
            logits, cache = net(x, cache=cache, return_intermediates=True, self_attn_kv_mask=visible[:, : i + 1])
            close(logits[:, -1], whole[:, i])


# A world model over states: a start token in front, rewards as numbers, features instead of outputs, a copy of averages


@torch.no_grad()
def test_a_world_model_over_states() -> None:
    net = ContinuousTransformerWrapper(
        dim_in=5,
        dim_out=None,
        max_seq_len=N,
        probabilistic=True,
        attn_layers=Decoder(
            **D,
            rotary_pos_emb=True,
            attn_gate_values=True,
            add_value_residual=True,
            attn_hybrid_fold_axial_dim=1,
            attn_hybrid_module=None,
        ),
    )
    net = copy.deepcopy(perturb(net).eval())
    states, start = torch.randn(B, N, 5), torch.randn(32)

    def run(x: Tensor, sum_embeds: Any, cache: Any = None) -> tuple[Tensor, Any]:
        return net(
            x,
            cache=cache,
            input_not_include_cache=True,
            sum_embeds=sum_embeds,
            prepend_embeds=None if cache is not None else start.expand(B, 1, -1),
            return_embeddings=True,
            return_intermediates=True,
        )

    for more in (0.0, 0.5, torch.randn(B, N, 32)):
        whole, _ = run(states, more)
        assert whole.shape == (B, N + 1, 32)
        steps, cache = [], None
        for i in range(N):
            out, cache = run(states[:, i : i + 1], more[:, i : i + 1] if isinstance(more, Tensor) else more, cache)
            steps.append(out)
        close(torch.cat(steps, dim=1), whole)


# A summary of hidden states, trained next to candidates of which the best one counts


def test_the_best_candidate_of_each_row_is_trained() -> None:
    model = ContinuousTransformerAutoencoder(
        dim=32, enc_depth=1, dec_depth=1, max_seq_len=N, heads=2, attn_dim_head=16, latents_dropout_prob=0.0
    )
    hidden = torch.randn(B * 2, N, 32, requires_grad=True)
    losses = model(hidden, return_unreduced_loss=True).view(B, 2)
    best = losses.argmin(dim=-1, keepdim=True)
    losses.gather(1, best).mean().backward()
    assert hidden.grad is not None
    trained = hidden.grad.view(B, 2, -1).ne(0).any(dim=-1)
    assert torch.equal(trained, F.one_hot(best[:, 0], 2).bool())
    assert model.encode(hidden).shape == (B * 2, 32)


# A subclass of the autoregressive wrapper


class Weighted(AutoregressiveWrapper):
    """Counts each token of the loss as often as the caller says."""

    def forward(self, x: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
        logits = self.net(x[:, :-1], **kwargs)
        each = F.cross_entropy(logits.mT, x[:, 1:], ignore_index=self.ignore_index, reduction="none")
        return (each * weights[:, 1:]).sum() / weights[:, 1:].sum()


def test_a_subclass_with_a_loss_of_its_own() -> None:
    net, ids = language_model(rotary_pos_emb=True), torch.randint(0, VOCAB, (B, N))
    model, plain = Weighted(net, pad_value=0), AutoregressiveWrapper(net, pad_value=0)
    close(model(ids, torch.ones(B, N)), plain(ids))
    assert (model.max_seq_len, model.pad_value, model.ignore_index) == (32, 0, -100)
    greedy: dict[str, Any] = {"seq_len": 5, "temperature": 0.0}
    assert torch.equal(model.generate(ids[:, :2], **greedy), plain.generate(ids[:, :2], **greedy))
    model(ids, torch.rand(B, N)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_another_distribution_of_the_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (
        ("vendoring", "x_transformers/__init__.py"),
        ("x_transformers", "elsewhere.py"),
        ("fine", "f.py"),
    ):
        info = tmp_path / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        (info / "RECORD").write_text(f"{file},,\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="comes from:") as refused:
        refuse_other_providers(Path(sys.executable))
    named = str(refused.value)
    assert "vendoring from an index" in named
    assert "x_transformers from an index" in named
    assert "fine" not in named


def test_the_documentation_lists_the_packages_of_these_versions() -> None:
    rows = re.findall(r"^\| \[([\w-]+)\]\(\S+\) \| (\S+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    yes = " | ".join(["yes"] * len(STAGES))
    assert rows == [(distribution, version, yes) for distribution, version in PACKAGES.values()]
