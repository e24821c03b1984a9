"""The next-token loss against a direct computation; generation against itself, whatever is cached."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb
from torch import Tensor
from torch._dynamo.utils import counters

import x_transformers.autoregressive_wrapper as module
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper, contrastive_decode_fn, top_k
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.modules import script_names

VOCAB, DIM = 24, 16
NETS = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True, "net": {"use_abs_pos_emb": False}},
    "alibi, absolute": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8},
    "dynamic bias": {"dynamic_pos_bias": True},
    "none": {"net": {"use_abs_pos_emb": False}},
    "sinusoid": {"net": {"scaled_sinu_pos_emb": True}},
    "memory tokens": {"net": {"num_memory_tokens": 2}},
    "memory tokens, rotary": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 2}},
    "interspersed": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3}},
    "interspersed, absolute": {"net": {"num_memory_tokens": 1, "memory_tokens_interspersed_every": 2}},
    "memory kv": {"attn_num_mem_kv": 3, "rotary_pos_emb": True},
    "grouped heads": {"attn_kv_heads": 2, "attn_qk_norm": True, "rotary_pos_emb": True},
    "window": {"attn_max_attend_past": 3, "alibi_pos_bias": True},
    "sink": {"attn_head_learned_sink": True, "attn_add_zero_kv": True},
    "new tokens only": {"net": {"input_not_include_cache": True}},
    "cross": {"cross_attend": True, "rotary_pos_emb": True},
    "unlimited": {"rotary_pos_emb": True, "net": {"max_seq_len": 0}},
    "latent": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8, "net": {"use_abs_pos_emb": False}},
    "explicit": {"attn_flash": False, "attn_softclamp_logits": True},
}
SLIDING = ["rotary", "alibi", "t5", "none", "sinusoid", "memory tokens, rotary", "memory kv", "cross", "latent"]


def build(name: str = "rotary", max_seq_len: int = 32, depth: int = 2, **wrapper) -> AutoregressiveWrapper:
    options = copy.deepcopy(NETS[name])
    around = options.pop("net", {})
    stack = Decoder(dim=DIM, depth=depth, heads=4, attn_dim_head=8, verbose=False, **options)
    net = TransformerWrapper(**{"num_tokens": VOCAB, "max_seq_len": max_seq_len, "attn_layers": stack, **around})
    return AutoregressiveWrapper(perturb(net), **wrapper)


def surroundings(name: str, batch: int = 2, prepended: bool = False) -> dict:
    kwargs = {}
    if name == "cross":
        mask = torch.ones(batch, 4, dtype=torch.bool)
        mask[0, 2:] = False
        kwargs |= {"context": torch.randn(batch, 4, DIM), "context_mask": mask}
    if prepended:
        kwargs |= {"prepend_embeds": torch.randn(batch, 3, DIM)}
    return kwargs


def rows_of(kwargs: dict, row: int) -> dict:
    return {name: t[row : row + 1] for name, t in kwargs.items()}


class Spy:
    """A filter that keeps all tokens and remembers the logits of each step."""

    def __init__(self) -> None:
        self.logits = []

    def __call__(self, logits: Tensor) -> Tensor:
        self.logits.append(logits)
        return logits


def sample(model, prompts, seq_len, seed=3, **kwargs):
    """Tokens `(..., m)` and the logits of every step `(m, b, v)`."""
    spy = Spy()
    torch.manual_seed(seed)
    tokens = model.generate(prompts, seq_len, filter_logits_fn=spy, **kwargs)
    return tokens, torch.stack(spy.logits)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], atol=2e-5, rtol=1e-5)


def direct(logits: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """The mean of `-log p(target)` over the targets that count, one by one."""
    terms = [
        -row[t].log_softmax(-1)[target]
        for row, labels in zip(logits, targets, strict=True)
        for t, target in enumerate(labels)
        if target != ignored
    ]
    return torch.stack(terms).mean()


# the loss


@pytest.mark.parametrize("ignored", [-100, 5], ids=["-100", "a token"])
def test_loss(ignored):
    model = build(ignore_index=ignored, pad_value=2)
    x = torch.randint(0, 8, (3, 7))
    x[0, 4:], x[1, 2] = ignored, ignored
    given = x.clone()
    loss, (logits, record) = model(x, return_outputs=True)
    expected = model.net(torch.where(x == ignored, 2, x))
    assert logits.shape == (3, 6, VOCAB)
    assert record.last_hidden.shape == (3, 7, DIM)
    torch.testing.assert_close(logits, expected[:, :-1])
    torch.testing.assert_close(loss, direct(expected[:, :-1], x[:, 1:], ignored))
    torch.testing.assert_close(loss, model(x))
    assert torch.equal(x, given)
    loss.backward()


def test_lens_hide_what_is_behind():
    model = build()
    x = torch.randint(0, VOCAB, (3, 7))
    lens = torch.tensor([7, 3, 0])
    logits = model.net(torch.where(torch.arange(7) < lens[:, None], x, 0))
    torch.testing.assert_close(
        model(x, lens=lens), direct(logits[:2, :-1], x[:2, 1:].masked_fill(torch.arange(1, 7) >= lens[:2, None], -100))
    )
    x[1, 3:] = 9999  # never looked at
    assert model(x, lens=lens).isfinite()


def test_integer_types():
    model = build()
    x = torch.randint(0, VOCAB, (2, 5))
    lens = torch.tensor([5, 3])
    for dtype in (torch.uint8, torch.int16):
        torch.testing.assert_close(model(x.to(dtype), lens=lens), model(x, lens=lens))
        assert torch.equal(
            model.generate(x.to(dtype), 3, temperature=0.0, prompt_lens=lens),
            model.generate(x, 3, temperature=0.0, prompt_lens=lens),
        )


def test_prepended_embeddings_are_not_predicted():
    model = build("memory tokens")
    x, embeds = torch.randint(0, VOCAB, (2, 5)), torch.randn(2, 3, DIM)
    expected = direct(model.net(x, prepend_embeds=embeds)[:, 3:-1], x[:, 1:])
    loss, (logits, _) = model(x, prepend_embeds=embeds, return_outputs=True)
    assert logits.shape == (2, 4, VOCAB)
    for value in (loss, model(x, prepend_embeds=embeds, excise_prepend_embeds=True)):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", ["rotary", "memory tokens", "interspersed"])
@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hidden_keys(name, prepended, training):
    model = build(name, mask_prob=0.4).train(training)
    x, kwargs = torch.randint(0, VOCAB, (3, 7)), surroundings(name, 3, prepended)
    theirs = torch.rand(3, 7) < 0.8
    theirs[:, 0] = True
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 5:] = False
    torch.manual_seed(7)
    loss = model(x, self_attn_kv_mask=theirs, mask=valid, **kwargs)
    torch.manual_seed(7)
    noise = torch.randn(3, 7)
    noise[:, 0] = -math.inf
    kept = torch.ones(3, 7, dtype=torch.bool)
    for row, drawn in zip(kept, noise, strict=True):
        row[drawn.argsort(descending=True)[:2]] = False
    logits = model.net(x, self_attn_kv_mask=kept & theirs, mask=valid, **kwargs)[:, 3 * prepended : -1]
    torch.testing.assert_close(loss, direct(logits, x[:, 1:]))


def test_z_loss():
    model, x = build(add_attn_z_loss=True), torch.randint(0, VOCAB, (2, 5))
    plain = AutoregressiveWrapper(model.net)
    _, record = model.net(x, return_attn_z_loss=True, attn_z_loss_weight=0.5)
    loss, (_, seen) = model(x, return_outputs=True, attn_z_loss_weight=0.5)
    torch.testing.assert_close(loss, plain(x) + record.attn_z_loss)
    torch.testing.assert_close(seen.attn_z_loss, record.attn_z_loss)
    torch.testing.assert_close(model(x) - plain(x), record.attn_z_loss * 1e-4 / 0.5, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("options", [{}, {"emb_dim": 12}, {"mixture_of_softmax": True}, {"num_memory_tokens": 2}])
def test_the_next_embedding(options, prepended):
    stack = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=32, attn_layers=stack, add_continuous_pred_head=True, **options
    )
    model, x = AutoregressiveWrapper(perturb(net), next_embed_loss_weight=0.3), torch.randint(0, VOCAB, (2, 6))
    kwargs = {"prepend_embeds": torch.randn(2, 3, net.emb_dim)} if prepended else {}
    lens = torch.tensor([6, 4])
    loss, (logits, _) = model(x, lens=lens, return_outputs=True, **kwargs)
    assert logits.shape == (2, 5, VOCAB)
    valid = torch.arange(6) < lens[:, None]
    shown = x.masked_fill(~valid, 0)
    _, (predicted, embeds) = net(shown, return_next_embed_pred=True, **kwargs)
    errors = (predicted[:, :-1] - embeds[:, 1:]).abs()[:, 3 * prepended :][valid[:, 1:]]
    plain = AutoregressiveWrapper(net, next_embed_loss_weight=0.0)(x, lens=lens, **kwargs)
    torch.testing.assert_close(loss, plain + 0.3 * errors.mean())
    loss.backward()
    assert net.to_next_embed_pred[0].weight.grad.any()
    generated = model.generate(x, 4, temperature=0.0, **kwargs)
    assert torch.equal(generated, model.generate(x, 4, temperature=0.0, cache_kv=False, **kwargs))


def test_log_probabilities_are_not_normalized_again():
    model, x = build(), torch.randint(0, VOCAB, (2, 5))
    model.net.output_is_log_prob = True
    picked = model.net(x)[:, :-1].gather(-1, x[:, 1:, None])
    torch.testing.assert_close(model(x), -picked.mean())


def test_targets_that_do_not_count_give_a_zero_with_a_gradient():
    model = build()
    loss = model(torch.tensor([[3, -100, -100], [4, -100, -100]]))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_low_precision():
    model = build().bfloat16()
    x = torch.randint(0, VOCAB, (2, 9))
    loss = model(x)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - model.float()(x).item()) < 0.05


def test_the_loss_compiles_to_one_graph():
    model = build(mask_prob=0.2, add_attn_z_loss=True)
    fn = torch.compile(model, backend="eager", fullgraph=True)
    x, lens = torch.randint(0, VOCAB, (2, 9)), torch.tensor([9, 4])
    torch.manual_seed(0)
    expected = model(x, lens=lens)
    torch.manual_seed(0)
    torch.testing.assert_close(fn(x, lens=lens), expected)


@pytest.mark.parametrize(
    ("x", "kwargs", "error", "said"),
    [
        (torch.zeros(4, dtype=torch.long), {}, ShapeError, r"shape \(4,\); they must be \(batch, tokens\)"),
        (torch.full((1, 4), 0.5), {}, InputError, "dtype torch.float32"),
        (torch.zeros(1, 4, dtype=torch.bool), {}, InputError, "dtype torch.bool"),
        (torch.zeros(1, 0, dtype=torch.long), {}, ShapeError, "nothing to predict"),
        (torch.tensor([[1, VOCAB]]), {}, TokenRangeError, "from 1 to 24"),
        (torch.tensor([[1, 2]]), {"lens": torch.tensor([1, 2])}, ShapeError, "1 whole numbers"),
        (torch.tensor([[1, 2]]), {"lens": torch.tensor([1.0])}, ShapeError, "dtype torch.float32"),
        (torch.tensor([[1, 2]]), {"lens": torch.tensor([3])}, InputError, r"`lens` holds \[3\]; the rows have 2"),
        (torch.tensor([[1, 2]]), {"lens": torch.tensor([-1])}, InputError, r"`lens` holds \[-1\]"),
        (torch.tensor([[1, 2]]), {"return_mems": True}, InputError, "`return_mems` cannot be given to the loss"),
        (torch.tensor([[1, 2]]), {"cache": KVCache()}, InputError, "`cache` cannot be given to the loss"),
    ],
)
def test_bad_input_of_the_loss(x, kwargs, error, said):
    with pytest.raises(error, match=said):
        build()(x, **kwargs)


def test_targets_beyond_the_logits():
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, logits_dim=5, attn_layers=Decoder(dim=8, depth=1, heads=1))
    with pytest.raises(TokenRangeError, match=r"targets run up to 8, .* logits for 5 tokens"):
        AutoregressiveWrapper(net)(torch.tensor([[1, 2, 8]]))


# construction


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_prob": 1.0}, r"`mask_prob` is 1.0; .* \[0, 1\)"),
        ({"next_embed_loss_weight": 0.5}, "`next_embed_loss_weight` is 0.5, but `net` has no such head"),
        ({"looped_loss_slope": 10}, "`looped_loss_slope` is 10, but `net` has no such head"),
        ({"ignor_index": 3}, "unknown keyword `ignor_index`. Did you mean `ignore_index`"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        build(**options)


def test_nets_that_cannot_be_wrapped():
    stack = Decoder(dim=8, depth=1, heads=1)
    with pytest.raises(ConfigError, match="`net` is a Decoder; it must be a TransformerWrapper"):
        AutoregressiveWrapper(stack)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no head"):
        AutoregressiveWrapper(
            TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack, return_only_embed=True)
        )
    for pooling in ({"average_pool_embed": True}, {"use_cls_token": True}):
        with pytest.raises(ConfigError, match="`net` pools its sequence"):
            AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack, **pooling))
    with pytest.raises(ConfigError, match="several heads"):
        AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack, num_output_heads=2))


def test_config_and_state_round_trip():
    model = build("grouped heads", ignore_index=3, mask_prob=0.1)
    twin = AutoregressiveWrapper.from_config(model.config)
    assert (twin.ignore_index, twin.mask_prob) == (3, 0.1)
    assert all(key.startswith("net.") for key in model.state_dict())
    twin.load_state_dict(model.state_dict())
    x = torch.randint(0, VOCAB, (1, 4))
    assert torch.equal(model.generate(x, 4, temperature=0.0), twin.generate(x, 4, temperature=0.0))


# generation: one answer, whatever is cached and whoever else is in the batch


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", NETS)
def test_caches_agree(name, prepended):
    model = build(name)
    x, kwargs = torch.randint(0, VOCAB, (2, 4)), surroundings(name, 2, prepended)
    expected = sample(model, x, 7, cache_kv=False, **kwargs)
    assert_same(sample(model, x, 7, **kwargs), expected)
    assert_same(sample(model, x, 7, cache="static", **kwargs), expected)
    tokens, logits = expected
    full = model.eval().net(torch.cat((x, tokens), dim=1), **kwargs)[:, -8:-1]
    torch.testing.assert_close(logits.transpose(0, 1), full, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", NETS)
def test_ragged_prompts_equal_each_alone(name, prepended):
    model = build(name)
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (5, 2, 3)]
    kwargs = surroundings(name, 3, prepended)
    results = {
        kind: sample(model, prompts, 6, **({"cache_kv": False} if kind == "no" else {"cache": kind}), **kwargs)
        for kind in ("no", "dynamic", "static")
    }
    for kind in ("dynamic", "static"):
        assert_same(results[kind], results["no"])
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, 6, temperature=0.0, **rows_of(kwargs, row))
        batched = model.generate(prompts, 6, temperature=0.0, **kwargs)
        assert torch.equal(alone, batched[row])
    # the same, told by lengths
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=11)
    assert_same(sample(model, padded, 6, prompt_lens=torch.tensor([5, 2, 3]), **kwargs), results["no"])


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("name", ["absolute", "rotary", "interspersed"])
def test_the_window_without_a_cache(name, ragged):
    """The model sees its last `max_seq_len` tokens, and nothing of what was before."""
    model = build(name, max_seq_len=6).eval()
    prompts = [torch.randint(0, VOCAB, (n,)) for n in ((4, 2) if ragged else (4, 4))]
    tokens, logits = sample(model, prompts, 8, cache_kv=False)
    for row, prompt in enumerate(prompts):
        whole = torch.cat((prompt, tokens[row]))
        for step in range(8):
            # a shorter row has padding in its window until that has slid out of it
            width = min(6, max(map(len, prompts)) + step)
            seen = whole[max(len(prompt) + step - width, 0) : len(prompt) + step]
            torch.testing.assert_close(logits[step, row], model.net(seen[None])[0, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", SLIDING)
def test_the_window_of_a_rolling_cache(name, prepended, most):
    """One layer deep, keys know nothing of older context: the same as a full pass that sees the last tokens alone."""
    model = build(name, max_seq_len=most, depth=1).eval()
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (3, 5)]
    kwargs = surroundings(name, 2, prepended)
    tokens, logits = sample(model, prompts, 7, **kwargs)
    for row, prompt in enumerate(prompts):
        whole = torch.cat((prompt[-most:], tokens[row]))[None]
        for step in range(7):
            so_far = whole[:, : whole.shape[1] - 7 + step]
            seen = torch.arange(so_far.shape[1]) >= so_far.shape[1] - most
            expected = model.net(so_far, self_attn_kv_mask=seen[None], **rows_of(kwargs, row))[0, -1]
            torch.testing.assert_close(logits[step, row], expected, atol=2e-5, rtol=1e-5)
    if name in ("rotary", "none", "alibi", "t5") and (name == "none" or not prepended):
        # where only distances matter, reading the window again gives the same
        assert_same((tokens, logits), sample(model, prompts, 7, cache_kv=False, **kwargs))


@pytest.mark.parametrize("prepended", [0, 2, 4])
def test_interspersed_memory_leaves_with_its_group(prepended, monkeypatch):
    model = build("interspersed", max_seq_len=5, depth=1)
    kwargs = {"prepend_embeds": torch.randn(1, prepended, DIM)} if prepended else {}
    held = []
    core = model.net.attn_layers.layers[0].attention.attend

    run = core.run

    def watching(q, k, *rest, **given):
        held.append(k.shape[-2])
        return run(q, k, *rest, **given)

    monkeypatch.setattr(core, "run", watching)
    _, record = model.generate(torch.tensor([1, 2, 3, 4]), 14, return_intermediates=True, **kwargs)
    assert record.cache.tokens - record.cache.prepended == 17

    columns, expected = [], []
    for item in range(prepended + 17):  # two memory tokens before every third item
        columns += ["m", "m", item] if item % 3 == 0 else [item]
        if item >= prepended + 3:
            prefix = columns.index(prepended - 1) + 1 if prepended else 0
            first = columns.index(item - 4) if item >= prepended + 5 else prefix
            while item >= prepended + 5 and columns[first - 1] == "m":
                first -= 1  # the memory tokens of the oldest group that begins in the window
            expected.append(prefix + len(columns) - max(first, prefix))
    assert held == expected


@pytest.mark.parametrize("name", ["rotary", "memory tokens, rotary", "interspersed"])
def test_prepended_embeddings_never_leave(name):
    model, x = build(name, max_seq_len=4, depth=1), torch.tensor([1, 2])
    embeds, forced = torch.randn(1, 3, DIM), torch.randint(0, VOCAB, (12,)).tolist()
    last = []
    for change in (0, 1):
        spy, coming = Spy(), iter(forced)
        embeds[0, 2] += change * torch.randn(DIM)  # a constant would vanish in the norm
        model.generate(x, 12, filter_logits_fn=lambda z: one_hot(spy(z), next(coming)), prepend_embeds=embeds)  # noqa: B023
        last.append(spy.logits[-1])
    assert not torch.allclose(*last, atol=1e-4)


def one_hot(logits: Tensor, token: int) -> Tensor:
    return torch.full_like(logits, -math.inf).index_fill(-1, torch.tensor(token), 0.0)


def test_streams_and_leading_axes():
    model = build()
    x = torch.randint(0, VOCAB, (2, 1, 4))
    expected = model.generate(x, 5, temperature=0.0)
    assert expected.shape == (2, 1, 5)
    assert torch.equal(model.generate(x[0, 0], 5, temperature=0.0), expected[0, 0])
    model.train()
    stream = model.stream(x, 5, temperature=0.0)
    assert model.training
    first = next(stream)
    assert first.shape == (2, 1)
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.stack([first, *stream], dim=-1), expected)
    assert model.training
    next(abandoned := model.stream(x, 5))
    abandoned.close()
    assert model.training
    with pytest.raises(InputError, match="seq_len"):  # at once
        model.stream(x, -1)


def test_seeds_repeat():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(x, 12, filter_logits_fn="top_p", filter_kwargs={"thres": 0.95}))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["rotary", "cross"])
def test_what_comes_out_can_be_trained_with(name, cache):
    model, x, kwargs = build(name), torch.randint(0, VOCAB, (2, 4)), surroundings(name)
    tokens, record = model.generate(x, 3, cache=cache, return_intermediates=True, **kwargs)
    model(tokens, **kwargs).backward()
    for token in model.stream(x, 2, **kwargs):
        model(torch.stack((token, token), dim=1), **kwargs).backward()
    with torch.set_grad_enabled(name != "cross"):  # its keys of the context were made without a graph
        logits, record = model.net(
            tokens[:, 2:], cache=record, input_not_include_cache=True, return_intermediates=True, **kwargs
        )
        model.net(tokens[:, :1], cache=record, input_not_include_cache=True, **kwargs)
    if logits.requires_grad and cache == "dynamic":
        logits.sum().backward()


# the end token


class Scripted(TransformerWrapper):
    """Expects the script's token behind the first, second ... generated token of each row."""

    def script(self, rows: list[list[int]], prompt: int):
        self.rows, self.prompt, self.calls = torch.tensor(rows), prompt, 0
        return AutoregressiveWrapper(self, pad_value=7)

    def forward(self, x, **kwargs):
        out, record = super().forward(x, **kwargs)
        out = F.one_hot(self.rows[:, self.calls], VOCAB).float().unsqueeze(1)
        self.calls += 1
        return out, record


def scripted(rows: list[list[int]], prompt: int = 2) -> AutoregressiveWrapper:
    net = Scripted(num_tokens=VOCAB, max_seq_len=32, attn_layers=Decoder(dim=DIM, depth=1, heads=1))
    return net.script(rows, prompt)


def test_rows_end_with_their_own_end_token():
    rows = [[1, 9, 2, 3], [4, 5, 9, 6], [9, 9, 8, 1]]
    x = torch.full((3, 2), 9)  # an end token in the prompt ends nothing
    model = scripted(rows)
    tokens = model.generate(x, 4, eos_token=9, temperature=0.0)
    assert tokens.tolist() == [[1, 9, 7], [4, 5, 9], [9, 7, 7]]
    assert model.net.calls == 3  # and the last row's end ends it all
    streamed = torch.stack(list(scripted(rows).stream(x, 4, eos_token=9, temperature=0.0)), dim=-1)
    assert torch.equal(streamed, tokens)
    assert scripted(rows).generate(x, 2, eos_token=9, temperature=0.0).tolist() == [[1, 9], [4, 5], [9, 7]]
    assert scripted(rows).generate(x, 4, temperature=0.0).tolist() == rows


def test_padding_that_is_the_end_token():
    model = scripted([[1, 7, 2], [3, 4, 7]])
    tokens = model.generate([torch.tensor([3]), torch.tensor([1, 2])], 3, eos_token=7, temperature=0.0)
    assert tokens.tolist() == [[1, 7, 7], [3, 4, 7]]


def test_no_tokens_are_asked_for():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    tokens, record = model.generate(x, 0, eos_token=3, return_intermediates=True)
    assert tokens.shape == (2, 0)
    assert tokens.dtype is torch.long
    assert record is None


# caches that are given


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["absolute", "memory tokens", "interspersed", "cross"])
@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
def test_a_prefix_is_read_once(name, static, prepended):
    model = build(name).eval()
    x, kwargs = torch.randint(0, VOCAB, (2, 6)), surroundings(name, 2, prepended)
    cache = model.net.static_cache(2, 20, prepended=3 * prepended) if static else KVCache()
    with torch.no_grad():
        _, prefix = model.net(x[:, :4], cache=cache, input_not_include_cache=True, return_intermediates=True, **kwargs)
    before = sample(model, x, 6, **kwargs)
    for _ in range(2):  # it is left as it was
        assert_same(sample(model, x, 6, cache=prefix, **kwargs), before)
    other = x.clone()
    other[:, 5] = 3
    assert_same(sample(model, other, 6, cache=prefix.cache, **kwargs), sample(model, other, 6, **kwargs))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_from_its_record(cache):
    model, x = build("memory tokens"), torch.randint(0, VOCAB, (2, 4))
    expected = model.generate(x, 9, temperature=0.0)
    first, record = model.generate(x, 5, temperature=0.0, cache=cache, return_intermediates=True)
    assert all(r.layer_type == "a" for r in record.attn_intermediates)
    rest = model.generate(torch.cat((x, first), dim=1), 4, temperature=0.0, cache=record)
    assert torch.equal(torch.cat((first, rest), dim=1), expected)


def test_repeated_rows_share_a_prefix():
    model, x = build(), torch.randint(0, VOCAB, (1, 4))
    _, record = model.generate(x, 1, return_intermediates=True)
    record.cache.repeat(3)
    prompts = torch.cat((x.expand(3, -1), torch.tensor([[1], [2], [3]])), dim=1)
    again = model.generate(prompts, 4, temperature=0.0, cache=record)
    assert torch.equal(again, model.generate(prompts, 4, temperature=0.0))


# what goes into each pass


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("name", ["rotary", "memory tokens", "interspersed"])
def test_masks_go_on(name, ragged):
    model, x = build(name), torch.randint(0, VOCAB, (2, 5))
    mask = torch.tensor([[True, False, True, True, True], [True, True, False, True, True]])
    lens = torch.tensor([4, 5]) if ragged else None
    for argument in ("mask", "self_attn_kv_mask"):
        kwargs = {argument: mask, "prompt_lens": lens}
        expected = sample(model, x, 5, cache_kv=False, **kwargs)
        assert_same(sample(model, x, 5, **kwargs), expected)
        assert_same(sample(model, x, 5, cache="static", **kwargs), expected)
        assert not torch.equal(expected[1][0], sample(model, x, 5, prompt_lens=lens)[1][0])
        alone = sample(model, x[:1, :4] if ragged else x[:1], 5, **{argument: mask[:1, :4] if ragged else mask[:1]})
        torch.testing.assert_close(alone[1][0, 0], expected[1][0, 0], atol=2e-5, rtol=1e-5)


def test_masks_in_a_window():
    model, x = build(max_seq_len=6, depth=1), torch.randint(0, VOCAB, (2, 8))
    mask = torch.rand(2, 8) < 0.7
    mask[:, -1] = True
    assert_same(sample(model, x, 7, mask=mask), sample(model, x, 7, mask=mask, cache_kv=False))


def test_arguments_that_cover_the_coming_tokens():
    stack = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=stack, embed_num_tokens={"kind": 4})
    model, x = AutoregressiveWrapper(perturb(net)), torch.randint(0, VOCAB, (2, 4))
    ids, extra, pos = torch.randint(0, 4, (2, 12)), torch.randn(2, 12, DIM), torch.arange(12) * 2
    covering = {"embed_ids": {"kind": ids}, "sum_embeds": extra, "pos": pos}
    expected = sample(model, x, 6, cache_kv=False, **covering)
    assert_same(sample(model, x, 6, **covering), expected)
    assert_same(sample(model, x, 6, cache="static", **covering), expected)

    by_function = sample(model, x, 6, embed_ids=lambda tokens: {"kind": tokens % 4})
    each = sample(model, x, 6, embed_ids={"kind": lambda tokens: tokens % 4}, cache_kv=False)
    assert_same(by_function, each)
    kinds = torch.cat((x, each[0]), dim=1) % 4
    assert_same(sample(model, x, 6, embed_ids={"kind": kinds}), each)


def test_nothing_but_prepended_embeddings():
    model, embeds = build("memory tokens"), torch.randn(2, 3, DIM)
    x = torch.zeros(2, 0, dtype=torch.long)
    expected = sample(model, x, 5, prepend_embeds=embeds, cache_kv=False)
    assert_same(sample(model, x, 5, prepend_embeds=embeds), expected)
    assert_same(sample(model, x, 5, prepend_embeds=embeds, cache="static"), expected)


def test_a_bidirectional_net_is_not_cached():
    stack = Encoder(dim=DIM, depth=1, heads=2, attn_dim_head=8)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCAB, max_seq_len=6, attn_layers=stack))
    tokens, record = model.generate(torch.tensor([[1, 2]]), 9, return_intermediates=True)
    assert tokens.shape == (1, 9)  # past the length, since nothing is cached
    assert record is None


# amateurs


def test_contrastive_decoding():
    expert, weak, weaker = (build("rotary", max_seq_len=n).eval() for n in (8, 8, 5))
    x = torch.randint(0, VOCAB, (2, 4))
    kwargs = {"alpha": 0.2, "beta": 1.0}
    expected, seen = [], x
    for _ in range(4):
        logits = expert.net(seen)[:, -1]
        logits = contrastive_decode_fn(logits, weak.net(seen)[:, -1], **kwargs)
        logits = contrastive_decode_fn(logits, weaker.net(seen[:, -5:])[:, -1], **kwargs)
        expected.append(logits.argmax(dim=-1, keepdim=True))
        seen = torch.cat((seen, expected[-1]), dim=1)
    weak.train()
    both = {"amateur_model": [weak, weaker.net], "contrastive_decode_kwargs": kwargs, "temperature": 0.0}
    assert torch.equal(expert.generate(x, 4, cache_kv=False, **both), torch.cat(expected, dim=1))
    assert weak.training
    assert expert.generate(x, 9, **both).shape == (2, 9)  # their caches roll, too
    one = expert.generate(x, 4, amateur_model=weak, temperature=0.0)
    assert torch.equal(one, expert.generate(x, 4, amateur_model=[weak.net], temperature=0.0, cache_kv=False))
    assert expert.generate(x, 4, amateur_model=weak, cache="static").shape == (2, 4)


# modes, refusals


def test_the_mode_is_restored_after_a_fault():
    model, x = build().train(), torch.randint(0, VOCAB, (2, 4))
    model.net.token_emb.eval()

    def fails(logits):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        model.generate(x, 4, filter_logits_fn=fails)
    assert model.training
    assert model.net.attn_layers.layers[0].training
    assert not model.net.token_emb.training


def test_dropout_is_off():
    stack = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, attn_dropout=0.5, ff_dropout=0.5)
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=stack, emb_dropout=0.5)
    model, x = AutoregressiveWrapper(net).train(), torch.randint(0, VOCAB, (2, 4))
    runs = [model.generate(x, 8, temperature=0.0) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "said"),
    [
        ("rotary", (-1,), {}, "`seq_len` is -1; it is how many tokens"),
        ("rotary", (2.0,), {}, "`seq_len` is 2.0"),
        ("rotary", (4, VOCAB), {}, "`eos_token` is 24; the vocabulary runs from 0 to 23"),
        ("rotary", (4,), {"temperature": -1.0}, "`temperature` is -1.0"),
        ("rotary", (4,), {"filter_logits_fn": "nucleus"}, "`filter_logits_fn` is 'nucleus'; .* top_p, top_k"),
        ("rotary", (4,), {"prompt_lens": [9, 9]}, "`prompt_lens` runs from 9"),
        ("absolute", (40,), {}, "43 tokens .* exceed `max_seq_len` = 32.* rotary positions.* `cache_kv = False`"),
        ("absolute", (40,), {"cache_kv": False, "restrict_to_max_seq_len": False}, "no absolute positions beyond"),
        ("rotary", (40,), {"cache": "static"}, "a static cache cannot slide.*restrict_to_max_seq_len = False"),
        ("rotary", (40,), {"compile": True}, "a static cache cannot slide"),
        ("rotary", (4,), {"cache": "static", "cache_kv": False}, "`cache_kv = False` switches it off"),
        ("rotary", (4,), {"cache": "ring"}, '`cache` is \'ring\'; it must be "dynamic", "static"'),
        ("interspersed", (4,), {"compile": True}, "interspersed memory tokens.*cannot be compiled"),
        ("rotary", (4,), {"mask": torch.ones(2, 3)}, r"`mask` has shape \(2, 3\); .* prompts' 4 columns"),
        ("rotary", (4,), {"pos": torch.arange(4)}, r"`pos` has shape \(4,\); it must cover the 7 tokens"),
        ("rotary", (4,), {"embed_ids": {"kind": torch.zeros(2, 4)}}, "may also be functions of the ids so far"),
        ("rotary", (4,), {"prompt_lens": [2, 4], "pos": torch.arange(9)}, "prompts of different lengths"),
        ("rotary", (4,), {"seq_start_pos": torch.zeros(2)}, "`seq_start_pos` cannot be given .* `prompt_lens`"),
        ("rotary", (4,), {"attn_mask": torch.ones(4, 4)}, "`attn_mask` cannot be given"),
        ("rotary", (4,), {"return_mems": True}, "`return_mems` cannot be given .* call the net itself"),
        ("rotary", (4,), {"amateur_model": torch.nn.Linear(1, 1)}, "an amateur is a Linear"),
    ],
)
def test_refusals(name, args, kwargs, said):
    model = build(name).train()
    with pytest.raises(InputError, match=said):
        model.generate(torch.ones(2, 4, dtype=torch.long), *args, **kwargs)
    assert model.training


def test_amateurs_that_do_not_fit():
    model, x = build(), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(InputError, match="there are 1 amateurs and 2 `contrastive_decode_kwargs`"):
        model.generate(x, 4, amateur_model=model, contrastive_decode_kwargs=[{}, {}])
    with pytest.raises(InputError, match=r"`contrastive_decode_kwargs` do not fit contrastive_decode_fn.*'gamma'"):
        model.generate(x, 4, amateur_model=model, contrastive_decode_kwargs={"gamma": 1})
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(dim=8, depth=1, heads=1))
    with pytest.raises(InputError, match="an amateur has a vocabulary of 9, the model one of 24"):
        model.generate(x, 4, amateur_model=net)


def test_caches_that_do_not_fit():
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    _, record = model.generate(x, 2, return_intermediates=True)
    with pytest.raises(InputError, match="the cache holds 5 tokens and the prompts have 4"):
        model.generate(x, 2, cache=record)
    longer = torch.cat((x, x), dim=1)
    with pytest.raises(InputError, match="the cache holds 2 rows, and there are 1 prompts"):
        model.generate(longer[:1], 2, cache=record)
    with pytest.raises(InputError, match="compile over a static cache, and the one given is dynamic"):
        model.generate(longer, 2, cache=record, compile=True)
    with pytest.raises(InputError, match="needs prompts of one length"):
        model.generate(longer, 2, cache=record, prompt_lens=[7, 8])
    with pytest.raises(InputError, match="5 tokens need 5 slots; the static cache has room for 4"):
        model.generate(x, 2, cache=model.net.static_cache(2, 4))
    with pytest.raises(InputError, match="the cache holds 3 rows"):
        model.generate(x, 2, cache=model.net.static_cache(3, 40))
    record.cache = None
    with pytest.raises(InputError, match="`cache` is a record without one"):
        model.generate(longer, 2, cache=record)


def test_logits_beyond_the_vocabulary():
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, logits_dim=12, attn_layers=Decoder(dim=8, depth=1, heads=1))
    with pytest.raises(InputError, match="logits for 12 tokens, but embeds 9"):
        AutoregressiveWrapper(net).generate(torch.tensor([1]), 2)


# compiled steps


@pytest.fixture
def graphs():
    """Counts the graphs that were made."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


EAGER = {"backend": "eager"}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("absolute", {}),
        ("alibi", {"prompt_lens": [4, 2]}),
        ("memory tokens, rotary", {"prompt_lens": [4, 2], "prepended": True}),
        ("cross", {}),
        ("memory kv", {"mask": torch.tensor([[True, False, True, True], [True] * 4])}),
        ("rotary", {"pos": torch.arange(60) * 3}),
    ],
)
def test_steps_compile_once(name, kwargs, graphs):
    # tracing takes as long as the model is deep; one of them has a second layer
    model = build(name, max_seq_len=200, depth=2 if name == "absolute" else 1)
    x = torch.randint(0, VOCAB, (2, 4))
    kwargs = dict(kwargs)
    kwargs |= surroundings(name, 2, kwargs.pop("prepended", False))
    expected = sample(model, x, 9, **kwargs)
    assert_same(sample(model, x, 9, compile=EAGER, **kwargs), expected)
    assert graphs() == 1
    assert sample(model, x, 30, seed=3, compile=EAGER, **kwargs)[0].shape == (2, 30)
    assert graphs() == 1  # the same room
    sample(model, x[:, :3] if not {"mask", "prompt_lens"} & set(kwargs) else x, 50, compile=EAGER, **kwargs)
    assert graphs() == 1
    sample(model, x, 56 if "pos" in kwargs else 80, compile=EAGER, **kwargs)
    sample(model, x, 56 if "pos" in kwargs else 150, compile=EAGER, **kwargs)
    assert graphs() <= 2  # one more that serves any room


@pytest.mark.parametrize("name", ["memory tokens, rotary", "cross"])
def test_prompts_compile_once(name, graphs):
    """One graph reads prompts of all lengths, and one the tokens behind them."""
    model, x = build(name, max_seq_len=200, depth=1), torch.randint(0, VOCAB, (2, 9))
    kwargs = surroundings(name, 2, False)
    for length in (4, 9, 7):
        expected = sample(model, x[:, :length], 5, **kwargs)
        assert_same(sample(model, x[:, :length], 5, compile=EAGER, compile_prefill=True, **kwargs), expected)
        assert graphs() == 2
    ragged = [x[0, :6], x[1, :3]]
    expected = sample(model, ragged, 5, **kwargs)
    assert_same(sample(model, ragged, 5, compile=EAGER, compile_prefill=True, **kwargs), expected)
    with pytest.raises(InputError, match="set `compile` too"):
        model.generate(x, 3, compile_prefill=True)


@torch._dynamo.config.patch(cache_size_limit=2)  # the name in all versions
def test_compiled_steps_belong_to_a_model(graphs):
    x = torch.randint(0, VOCAB, (1, 4))
    model = build(depth=1)
    before = model.generate(x, 4, temperature=0.0, compile=EAGER)
    keys = list(model.state_dict())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert len(model._compiled) == 1
    for twin in twins:
        assert twin._compiled == {}
        assert list(twin.state_dict()) == keys
        assert torch.equal(twin.generate(x, 4, temperature=0.0, compile=EAGER), before)
    for _ in range(3):  # more models than graphs that one function may have
        build(depth=1).generate(x, 3, compile=EAGER)


def test_the_record_of_compiled_steps_goes_on(graphs):
    model, x = build(), torch.randint(0, VOCAB, (2, 4))
    expected = model.generate(x, 9, temperature=0.0)
    first, record = model.generate(x, 5, temperature=0.0, compile=EAGER, return_intermediates=True)
    longer = torch.cat((x, first), dim=1)
    for again in range(2):
        rest = model.generate(longer, 4, temperature=0.0, cache=record, compile=EAGER if again else False)
        assert torch.equal(torch.cat((first, rest), dim=1), expected)


def test_progress_is_shown_on_request(capsys):
    model, x = build(), torch.randint(0, VOCAB, (1, 4))
    expected = model.generate(x, 3, temperature=0.0)
    assert capsys.readouterr().err == ""
    assert torch.equal(model.generate(x, 3, temperature=0.0, progress=True), expected)
    assert "3/3" in capsys.readouterr().err


def test_reference_names():
    names = ("top_p", "top_k", "top_a", "min_p", "gumbel_noise", "gumbel_sample", "align_right", "pad_at_dim")
    names += (
        "modify_cached_kv",
        "eval_decorator",
        "contrastive_decode_fn",
        "FILTER_LOGITS_FN",
        "AutoregressiveWrapper",
        "log",
    )
    assert sorted((*names, *script_names.__all__)) == sorted(module.__all__)
    defaults = inspect.signature(AutoregressiveWrapper.generate).parameters
    assert defaults["filter_logits_fn"].default is top_k
