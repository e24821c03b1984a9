"""From options to the list of sublayers, the order in which they run, and what happens between blocks."""

import copy
import inspect
import pickle

import pytest
import torch
from catalog import close, perturbed
from torch import Tensor

from x_transformers import Decoder, Encoder, PrefixDecoder, TransformerBlock, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.layers.execution_order import repeated
from x_transformers.layers.kinds import KINDS
from x_transformers.layers.pass_state import PassInputs
from x_transformers.layers.plan import make_plan

DIM = 8
SMALL = {"dim": DIM, "depth": 2, "heads": 2, "attn_dim_head": 4, "verbose": False}


def kinds(**options: object) -> str:
    return "".join(make_plan("Decoder", {"depth": 2, **options}).sequence.kinds)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "afaf"),
        ({"macaron": True}, "faffaf"),
        ({"cross_attend": True, "macaron": True}, "facffacf"),
        ({"cross_attend": True, "only_attn": True}, "acac"),
        ({"cross_attend": True, "only_cross": True}, "cfcf"),
        ({"sandwich_coef": 1, "depth": 3}, "aafaff"),
        ({"sandwich_coef": 1, "depth": 3, "macaron": True}, "afaffaff"),
        ({"sandwich_coef": 1, "depth": 3, "cross_attend": True}, "aacfacff"),
        ({"par_ratio": 2, "depth": 3}, "aaafff"),
        ({"par_ratio": 5, "depth": 6}, "afffffafffff"),
        ({"par_ratio": 4, "depth": 12}, "aff" * 6 + "f" * 6),
        ({"par_ratio": 12, "depth": 6}, "a" + "f" * 15),
        ({"par_ratio": 3, "depth": 6, "cross_attend": True}, "ac" * 6 + "f" * 6),
        ({"par_ratio": 3, "depth": 4, "macaron": True}, "af" * 4 + "f" * 4),
        ({"par_ratio": 4, "depth": 6, "only_attn": True}, "a"),
        ({"custom_layers": "aff", "depth": None}, "aff"),
    ],
)
def test_lists_of_layers(options: dict, wanted: str) -> None:
    assert kinds(**options) == wanted


def test_tied_layers_are_one_block_run_repeatedly() -> None:
    sequence = make_plan(
        "Decoder", {"depth": 3, "cross_attend": True, "macaron": True, "weight_tie_layers": True}
    ).sequence
    assert sequence.kinds == tuple("facf")
    assert sequence.order == (0, 1, 2, 3) * 3
    assert sequence.depth == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sandwich_coef": 3}, "`sandwich_coef` is 3; it must lie between 1 and `depth` = 2"),
        ({"par_ratio": 1}, "`par_ratio` is 1; it must lie between 2 and the 4"),
        ({"par_ratio": 2, "cross_attend": True}, "2 attentions do not fit into groups of 1"),
        ({"par_ratio": 2, "sandwich_coef": 1}, "are alternatives of one choice"),
        ({"par_ratio": 2, "depth": None}, "`depth` is missing"),
        ({"depth": None}, "`depth` is missing"),
        ({"custom_layers": "af"}, "drop `depth`"),
        ({"custom_layers": "ax", "depth": None}, "it must hold the codes a, c, f and m"),
        ({"custom_layers": "acf", "depth": None}, "with a c needs `cross_attend = True`"),
        ({"custom_layers": "af", "depth": None, "cross_attend": True}, "needs a c among `custom_layers`"),
        ({"custom_layers": "af", "depth": None, "only_attn": True}, "drop them or `only_attn`"),
        ({"only_cross": True}, "it needs `cross_attend = True`"),
        ({"layers_execute_order": (0, 4)}, "indices between 0 and 3"),
        ({"layers_execute_order": (0, -1)}, "indices between 0 and 3"),
        ({"layers_execute_order": (0,), "only_attn": True}, "numbers sublayers with feedforwards"),
        ({"weight_tie_layers": True, "layers_execute_order": (0,)}, "`weight_tie_layers` repeats one block"),
        ({"weight_tie_layers": True, "par_ratio": 2}, "`weight_tie_layers` repeats one block"),
        ({"shift_tokens": (1, 0, 1)}, "`shift_tokens` holds 3 values, but there are 4"),
        ({"layer_dropout": (0.1,)}, "`layer_dropout` holds 1 values"),
        ({"unet_skips": True, "depth": 1}, "there is 1 block"),
        ({"unet_skips": True, "weight_tie_layers": True}, "drop one of them"),
        ({"unet_skips": True, "only_attn": True}, "drop one of them"),
        ({"unet_skips": True, "layers_execute_order": (2, 3, 0, 1)}, "run it later"),
    ],
)
def test_lists_that_make_no_sense(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**{**SMALL, **options})


# kinds of branches


def test_copies_refer_to_the_one_table_of_kinds() -> None:
    stack = Decoder(**SMALL, cross_attend=True)
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert [branch.kind for branch in twin.sublayers] == [KINDS[letter] for letter in "acf" * 2]
        assert all(step.kind is KINDS[step.kind.letter] for step in twin.steps)


def test_stacks_call_the_functions_of_their_branches_as_modules() -> None:
    stack, ran = Decoder(**SMALL, cross_attend=True), []
    for branch in stack.sublayers:
        branch.fn.register_forward_hook(lambda module, *_: ran.append(module))
    stack(torch.randn(1, 3, DIM), context=torch.randn(1, 2, DIM))
    assert ran == [branch.fn for branch in stack.sublayers]


def test_the_arguments_of_a_pass_have_the_same_order_in_both_places() -> None:
    """`forward` passes them on by position."""
    assert list(inspect.signature(Decoder.forward).parameters)[1:] == list(inspect.signature(PassInputs).parameters)


# orders of a call


def test_repeated_blocks() -> None:
    sequence = make_plan("Decoder", {"depth": 3}).sequence
    assert repeated(((0, 1), 2), sequence) == (0, 1, 2, 3, 0, 1, 2, 3, 4, 5)
    assert repeated((1, 3), sequence) == (0, 1, 2, 3, 2, 3, 2, 3, 4, 5)
    assert repeated([(0, 2), ((1, 2), 2)], sequence) == (0, 1, 0, 1, 2, 3, 4, 5, 2, 3, 4, 5)
    for wrong in (((0, 1), 0), ((1, 3), 2), ([(0, 2), (0, 3)]), ([((0, 1), 2), (1, 2)]), ((2, 1), 2)):
        with pytest.raises(ConfigError, match="`repeat_blocks` has the entry"):
            repeated(wrong, sequence)


@torch.no_grad()
def test_an_order_of_a_call_is_the_order_of_construction() -> None:
    plain = perturbed(Decoder(**SMALL))
    ordered = Decoder(**SMALL, layers_execute_order=(0, 1, 0, 1, 2, 3)).eval()
    ordered.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, DIM)
    close(plain(x, layers_execute_order=(0, 1, 0, 1, 2, 3)), ordered(x))
    close(plain(x, repeat_blocks=(0, 2)), ordered(x))
    assert (plain(x) - ordered(x)).abs().max() > 1e-3


def test_orders_that_cannot_run() -> None:
    stack, x = Decoder(**SMALL), torch.randn(1, 4, DIM)
    with pytest.raises(InputError, match="indices between 0 and 3"):
        stack(x, layers_execute_order=(0, 4))
    with pytest.raises(InputError, match="pass one of them"):
        stack(x, layers_execute_order=(0, 1), repeat_blocks=(0, 2))
    with pytest.raises(InputError, match="needs a stack of equal blocks"):
        Decoder(**{**SMALL, "depth": None, "custom_layers": "af"})(x, repeat_blocks=(0, 2))
    with pytest.raises(InputError, match="run it later"):
        Decoder(**SMALL, unet_skips=True)(x, layers_execute_order=(2, 3))


@torch.no_grad()
def test_a_cache_belongs_to_its_order() -> None:
    stack, x = perturbed(Decoder(**SMALL)), torch.randn(2, 6, DIM)
    first, state = stack(x[:, :3], return_hiddens=True, repeat_blocks=(1, 2))
    rest = stack(x[:, 3:], cache=state, input_not_include_cache=True, repeat_blocks=(1, 2))
    close(torch.cat((first, rest), dim=1), stack(x, repeat_blocks=(1, 2)))
    with pytest.raises(InputError, match="the cache was filled by layers"):
        stack(x[:, 3:], cache=state, input_not_include_cache=True)
    with pytest.raises(InputError, match="the cache was filled by layers"):
        stack(x, cache=stack.static_cache(2, 8), input_not_include_cache=True, repeat_blocks=(1, 2))


# between blocks


@torch.no_grad()
def test_block_transforms_count_executed_blocks_from_two() -> None:
    stack, x = perturbed(Decoder(**SMALL)), torch.randn(1, 4, DIM)
    seen: list[int] = []

    def note(block: int, stream: Tensor) -> Tensor:
        seen.append(block)
        return stream

    stack(x, transform_block_inputs=note, repeat_blocks=(0, 2))
    assert seen == [2, 3]
    _, record = stack(x, return_hiddens=True)
    moved = stack(x, transform_block_inputs={2: lambda stream: stream + 1.0})
    close(moved, stack(record.block_hiddens[0] + 1.0, layers_execute_order=(2, 3)))


def test_custom_lists_are_blocks_of_one_layer() -> None:
    stack = Decoder(**{**SMALL, "depth": None, "custom_layers": "aff"})
    _, record = stack(torch.randn(1, 4, DIM), return_hiddens=True)
    assert len(record.block_hiddens) == 3


@torch.no_grad()
def test_the_first_block_transform_is_of_the_embeddings() -> None:
    model = perturbed(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**SMALL)))
    ids = torch.randint(0, 9, (2, 5))
    wanted = model(ids, transform_token_embeds=lambda t: 2 * t)
    close(model(ids, transform_block_inputs={1: lambda t: 2 * t}), wanted)
    close(model(ids, transform_block_inputs=lambda k, t: 2 * t if k == 1 else t), wanted)
    close(model(ids, transform_block_inputs={1: lambda t: 3 * t}, transform_token_embeds=lambda t: 2 * t), wanted)


@pytest.mark.parametrize(
    ("keywords", "sources"),
    [
        ({"depth": 6}, {6: 4, 8: 2, 10: 0}),
        ({"depth": 5}, {6: 2, 8: 0}),
        ({"depth": 4, "macaron": True}, {6: 3, 9: 0}),
        ({"depth": 2, "cross_attend": True}, {3: 0}),
        ({"depth": None, "custom_layers": "afaf"}, {2: 1, 3: 0}),
        ({"depth": 2, "sandwich_coef": 1}, {2: 1, 3: 0}),
    ],
)
def test_sources_of_skips(keywords: dict, sources: dict) -> None:
    assert Decoder(**{**SMALL, "unet_skips": True, **keywords}).skip_sources == sources


@torch.no_grad()
def test_skips_by_hand() -> None:
    stack = perturbed(Encoder(**{**SMALL, "unet_skips": True, "pre_norm_has_final_norm": False}))
    x = torch.randn(2, 4, DIM)
    half = stack(x, layers_execute_order=(0, 1))
    joined = torch.cat((x, half), dim=-1) @ stack.skip_combines["2"].combine.weight.T
    plain = Encoder(**{**SMALL, "pre_norm_has_final_norm": False}).eval()
    plain.load_state_dict(stack.state_dict(), strict=False)
    close(stack(x), plain(joined, layers_execute_order=(2, 3)))


def test_layers_without_a_combiner_have_none() -> None:
    assert list(Decoder(**{**SMALL, "depth": 6, "unet_skips": True}).state_dict())[-1] == "final_norm.gamma"
    keys = [key for key in Decoder(**{**SMALL, "depth": 6, "unet_skips": True}).state_dict() if "skip" in key]
    assert keys == [f"skip_combines.{index}.combine.weight" for index in (6, 8, 10)]


# shifted tokens


@torch.no_grad()
def test_shift_by_hand() -> None:
    x = torch.arange(1.0, 13.0).reshape(1, 3, 4)
    from x_transformers.layers.branches.shift import TokenShift

    class Nothing:
        states = None

        class call:  # noqa: N801
            class query:  # noqa: N801
                token_mask = placed = None

            token_mask = None

    causal, _ = TokenShift(1, 4, causal=True)(x, None, Nothing())  # type: ignore[arg-type]
    assert causal[0].tolist() == [[1, 2, 0, 0], [5, 6, 3, 4], [9, 10, 7, 8]]
    both, _ = TokenShift(1, 4, causal=False)(x, None, Nothing())  # type: ignore[arg-type]
    # slices of one feature: from the right, unmoved, from the left; the fourth does not fill a slice
    assert both[0].tolist() == [[5, 2, 0, 4], [9, 6, 3, 8], [0, 10, 7, 12]]


def test_more_slices_than_features() -> None:
    with pytest.raises(ConfigError, match=r"`shift_tokens` is 8.*9 slices must not exceed the 8 features"):
        Decoder(**SMALL, shift_tokens=8)


@torch.no_grad()
def test_shifts_longer_than_the_sequence() -> None:
    for stack in (Decoder(**SMALL, shift_tokens=3).eval(), Encoder(**SMALL, shift_tokens=3).eval()):
        assert stack(torch.randn(1, 2, DIM)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_shift_through_a_cache(static: bool) -> None:
    stack, x = perturbed(Decoder(**SMALL, shift_tokens=(2, 1, 0, 3))), torch.randn(2, 9, DIM)
    wanted = stack(x)
    state = stack.static_cache(2, 9) if static else None
    got = []
    for start, end in ((0, 1), (1, 2), (2, 5), (5, 6), (6, 9)):
        out, state = stack(x[:, start:end], cache=state, input_not_include_cache=True, return_hiddens=True)
        got.append(out)
    close(torch.cat(got, dim=1), wanted)


@torch.no_grad()
def test_shift_reads_no_padding() -> None:
    x = torch.randn(2, 7, DIM)
    start = torch.tensor([0, 3])
    stack = perturbed(Decoder(**SMALL, shift_tokens=2))
    close(stack(x, seq_start_pos=start)[1:, 3:], stack(x[1:, 3:]))
    out, state = stack(x[:, :5], seq_start_pos=start, return_hiddens=True)
    rest = stack(x[:, 5:], seq_start_pos=start, cache=state, input_not_include_cache=True)
    close(torch.cat((out, rest), dim=1)[1:, 3:], stack(x[1:, 3:]))
    encoder, mask = perturbed(Encoder(**SMALL, shift_tokens=2)), torch.arange(7) < torch.tensor([[7], [4]])
    close(encoder(x, mask=mask)[1:, :4], encoder(x[1:, :4]))


# prefix decoders


@torch.no_grad()
def test_who_sees_whom_behind_a_prefix() -> None:
    stack = perturbed(PrefixDecoder(**SMALL))
    x = torch.randn(2, 6, DIM, requires_grad=True)

    def reach(**arguments: object) -> Tensor:
        """`(b, i, j)`: which tokens a token's output depends on."""
        with torch.enable_grad():
            out = stack(x, **arguments)
            rows = [torch.autograd.grad(out[:, i].square().sum(), x, retain_graph=True)[0] for i in range(6)]
        return torch.stack(rows, dim=1).abs().sum(dim=-1) > 0

    past = torch.ones(6, 6, dtype=torch.bool).tril()
    assert (reach() == past).all()
    assert (reach(prefix_attn_len=3) == (past | (torch.arange(6) < 3))).all()
    both = reach(prefix_attn_len=torch.tensor([0, 4]))
    assert (both[0] == past).all()
    assert (both[1] == (past | (torch.arange(6) < 4))).all()


@torch.no_grad()
def test_a_prefix_decoder_pads_masks_and_remembers() -> None:
    for keywords in ({}, {"rotary_pos_emb": True, "shift_tokens": 1}, {"attn_num_mem_kv": 2}):
        stack = perturbed(PrefixDecoder(**SMALL, **keywords))
        x, start = torch.randn(2, 7, DIM), torch.tensor([0, 3])
        close(
            stack(x, prefix_attn_len=2, seq_start_pos=start)[1:, 3:],
            stack(x[1:, 3:], prefix_attn_len=2),
        )
        seen = torch.ones(7, 7, dtype=torch.bool)
        seen[:, 1] = False
        moved = x.clone()
        moved[:, 1] += 1.0
        others = torch.arange(7) != 1
        if "shift_tokens" not in keywords:
            close(
                stack(moved, prefix_attn_len=4, attn_mask=seen)[:, others],
                stack(x, prefix_attn_len=4, attn_mask=seen)[:, others],
            )
        memories = [torch.randn(2, 3, DIM) for _ in range(2)]
        assert stack(x, prefix_attn_len=2, mems=memories).shape == x.shape


def test_prefix_decoder_refusals() -> None:
    with pytest.raises(ConfigError, match="causal after its prefix: drop `causal`"):
        PrefixDecoder(**SMALL, causal=True)
    stack = PrefixDecoder(**SMALL)
    with pytest.raises(ShapeError, match=r"`prefix_attn_len` has shape \(3,\)"):
        stack(torch.randn(2, 4, DIM), prefix_attn_len=torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match="only a causal stack can use a cache"):
        stack(torch.randn(2, 4, DIM), cache=Decoder(**SMALL)(torch.randn(2, 4, DIM), return_hiddens=True)[1])
    assert not stack.can_cache_kv


def test_transformer_block() -> None:
    block = TransformerBlock(DIM, heads=2, attn_dim_head=4, verbose=False)
    assert block.final_norm is None
    assert block.layer_types == ("a", "f")
    assert block(torch.randn(1, 3, DIM)).shape == (1, 3, DIM)
    assert TransformerBlock.from_config(block.config).config == block.config
