"""Residual connections and readers of earlier layers, against their formulas and in the places where they go wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from loguru import logger
from torch import Tensor, nn

from x_transformers import CrossAttender, Decoder, Encoder, PrefixDecoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.x_transformers import (
    AttentionResidual,
    DynamicLIMe,
    GatedMultiResidual,
    HyperConnection,
    MVSplitResidualUpdate,
    OrthogonalResidualUpdate,
    sinkhorn,
)

DIM = 8
SMALL = {"dim": DIM, "depth": 2, "heads": 2, "attn_dim_head": 4, "verbose": False}
GATED = {"gated_multi_residual": True, "residual_fn_kwargs": {"read_gate_rank": 3}}


def decoder(**keywords: object) -> Decoder:
    return perturbed(Decoder(**{**SMALL, **keywords}))  # type: ignore[return-value]


# orthogonal


def test_orthogonal_update_is_per_token() -> None:
    update = OrthogonalResidualUpdate(2)
    out = torch.tensor([[[1.0, 1.0], [3.0, 4.0]]])
    kept = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]])
    close(update.write(out, kept), torch.tensor([[[2.0, 1.0], [3.0, 5.0]]]))


def test_orthogonal_update_scales_the_stream() -> None:
    update = OrthogonalResidualUpdate(2, scale_residual=True)
    nn.init.constant_(update.scale, 2.0)
    close(update.write(torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0]]])), torch.tensor([[[2.0, 1.0]]]))


def test_orthogonal_update_of_a_zero_stream_is_the_sum() -> None:
    out = torch.randn(1, 3, DIM)
    close(OrthogonalResidualUpdate(DIM).write(out, torch.zeros_like(out)), out)


# mean and deviation


def test_mv_split_formula() -> None:
    update = MVSplitResidualUpdate(1, init_alpha=0.5, init_beta=2.0)
    out, kept = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[10.0], [20.0]]])
    # means 2 and 15: r + 2 (o - 2) + 0.5 (2 - 15)
    close(update.write(out, kept), torch.tensor([[[10 - 2 - 6.5], [20 + 2 - 6.5]]]))


def test_mv_split_learned_starts_as_its_constants() -> None:
    out, kept = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    plain = MVSplitResidualUpdate(DIM, init_alpha=0.3, init_beta=0.7)
    learned = MVSplitResidualUpdate(DIM, init_alpha=0.3, init_beta=0.7, learned=True)
    close(learned.write(out, kept), plain.write(out, kept))


@torch.no_grad()
def test_mv_split_takes_running_means_in_a_causal_stack() -> None:
    stack = decoder(mv_split_residual=True, residual_fn_kwargs={"init_alpha": 0.5, "init_beta": 0.9})
    x = torch.randn(2, 6, DIM)
    other = x.clone()
    other[:, 4:] = torch.randn(2, 2, DIM)
    close(stack(other)[:, :4], stack(x)[:, :4])
    assert (stack(other)[:, 4:] - stack(x)[:, 4:]).abs().amin() > 0


@torch.no_grad()
def test_mv_split_means_skip_hidden_tokens() -> None:
    keywords = {**SMALL, "mv_split_residual": True, "residual_fn_kwargs": {"init_alpha": 0.5, "init_beta": 0.9}}
    x, mask = torch.randn(1, 6, DIM), torch.tensor([[True, True, False, True, True, False]])
    for stack in (perturbed(Encoder(**keywords)), perturbed(Decoder(**keywords))):
        other = torch.where(mask[..., None], x, torch.randn_like(x))
        close(stack(other, mask=mask)[mask], stack(x, mask=mask)[mask])


def test_prefix_decoder_refuses_means_over_the_sequence() -> None:
    with pytest.raises(ConfigError, match=r"`mv_split_residual` takes means.*future"):
        PrefixDecoder(**SMALL, mv_split_residual=True)


# hyper-connections


def test_sinkhorn_by_hand() -> None:
    close(sinkhorn(torch.eye(2), 5)[0], torch.tensor([0.731059, 0.268941]))
    close(sinkhorn(torch.eye(3), 5)[0], torch.tensor([0.576117, 0.211942, 0.211942]))
    close(
        sinkhorn(torch.tensor([[1.0, 0.0], [0.5, 2.0]]), 5),
        torch.tensor([[0.776958, 0.222359], [0.223042, 0.777641]]),
    )


def test_hyper_connection_at_its_start() -> None:
    connection = HyperConnection(DIM, layer_index=4, num_residual_streams=3)
    streams = torch.randn(2, 5, 3, DIM)
    x, (kept, beta) = connection.read(streams)
    close(beta, torch.full((2, 5, 3), 1.466040))
    weights = torch.sigmoid(torch.tensor([0.0, 1.0, 0.0]))  # stream 4 % 3 is read first
    close(x, torch.einsum("s,bnsd->bnd", weights, streams))
    close(kept, torch.einsum("st,bnsd->bntd", sinkhorn(torch.eye(3), 5), streams))
    out = torch.randn(2, 5, DIM)
    close(connection.write(out, (kept, beta)), kept + beta[..., None] * out[:, :, None])


def test_hyper_connection_mixes_by_ones_on_request() -> None:
    connection = HyperConnection(DIM, layer_index=0, num_residual_streams=2, reference_mix=True)
    streams = torch.randn(1, 3, 2, DIM)
    close(connection.read(streams)[1][0], streams.sum(dim=2, keepdim=True).expand(-1, -1, 2, -1))


@torch.no_grad()
def test_streams_do_not_grow_with_depth() -> None:
    stack = Decoder(**{**SMALL, "depth": 12, "num_residual_streams": 4}).eval()
    _, record = stack(torch.randn(1, 5, DIM), return_hiddens=True)
    norms = [hidden.norm(dim=-1).mean() for hidden in record.hiddens]
    assert max(norms) < 10 * norms[0]


def test_streams_are_folded_for_callers() -> None:
    stack = decoder(num_residual_streams=3, qkv_receive_diff_residuals=True)
    seen = []
    _, record = stack(
        torch.randn(2, 5, DIM), return_hiddens=True, transform_block_inputs=lambda k, x: seen.append(x.shape) or x
    )
    assert seen == [(6, 5, DIM)]
    assert [h.shape for h in record.hiddens] == [(6, 5, DIM)] * 2
    assert [h.shape[-3:] for h in record.layer_hiddens] == [(2, 5, DIM)] * 4 + [(6, 5, DIM)]
    assert record.layer_hiddens[0].shape == (3, 2, 5, DIM)
    assert record.block_hiddens[-1] is record.last_hidden


@torch.no_grad()
def test_folding_keeps_streams_of_a_row_together() -> None:
    stack = decoder(num_residual_streams=3)
    nn.init.normal_(stack.frame.emb)
    x = torch.randn(2, 5, DIM)
    _, record = stack(x, return_hiddens=True)
    close(record.hiddens[0][4], x[1] + stack.frame.emb[1])


@torch.no_grad()
def test_shifts_of_views_do_not_depend_on_the_batch() -> None:
    for more in ({"num_residual_streams": 2}, {"integrate_layers": True}):
        views = {} if "integrate_layers" in more else {"qkv_receive_diff_residuals": True}
        stack = decoder(**more, **views, shift_tokens=3)
        x = torch.randn(4, 6, DIM)
        close(stack(x)[:1], stack(x[:1]))


def test_reference_weights_name_the_keyword_of_their_mixing() -> None:
    ours = Decoder(**SMALL, num_residual_streams=2)
    theirs = Decoder(**SMALL, num_residual_streams=2, hyper_conn_reference_mix=True).export_reference_state_dict()
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    ours.load_state_dict(theirs)
    logger.remove(handler)
    assert len(said) == 1
    assert "`hyper_conn_reference_mix = True`" in said[0]


# gated streams


def test_gated_multi_residual_formula() -> None:
    gated = perturbed(GatedMultiResidual(4, layer_index=1, num_residual_streams=2, num_input_views=3, read_gate_rank=2))
    assert isinstance(gated, GatedMultiResidual)
    streams = torch.randn(1, 3, 2, 4)
    views, (kept, beta) = gated.read(streams)
    normed = streams / streams.square().mean(dim=-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()
    normed = normed * gated.read_gain
    joined = torch.cat((normed[:, :, 0], normed[:, :, 1]), dim=-1) / 2
    z = F.silu(joined @ gated.to_bottleneck.weight.T) * gated.dynamic_gate_scale
    gates = (z @ gated.to_read_gate.weight.T).reshape(1, 3, 3, 2, 4) + gated.static_read_logit
    for view in range(3):
        close(views[view], (gates[:, :, view].sigmoid() * normed).sum(dim=2) / 2)
    close(beta, 2 * (z @ gated.to_write_gate.weight.T + gated.static_write_logit).sigmoid())
    assert torch.equal(kept, streams)


def test_gated_multi_residual_moves_its_norms() -> None:
    stack = Decoder(**SMALL, **GATED, num_residual_streams=2)
    branch = stack.branches("a")[0]
    assert branch.norm is None
    assert branch.stream_norm is not None
    assert stack.final_norm is not None
    assert Decoder(**SMALL, **GATED, pre_norm=False).final_norm is not None
    assert Decoder(**SMALL, **GATED).frame.emb is None


def test_gated_multi_residual_needs_a_rank() -> None:
    with pytest.raises(ConfigError, match="`read_gate_rank` is None"):
        Decoder(**SMALL, gated_multi_residual=True)
    with pytest.raises(ConfigError, match="drop `sandwich_norm`"):
        Decoder(**SMALL, **GATED, sandwich_norm=True)


@torch.no_grad()
def test_norms_on_streams_read_the_condition_of_their_row() -> None:
    for keywords in (
        {**GATED, "num_residual_streams": 2, "use_adaptive_rmsnorm": True},
        {"num_residual_streams": 2, "pre_norm": False, "use_adaptive_layernorm": True},
        {"resi_dual": True, "use_adaptive_layernorm": True},
    ):
        stack = decoder(**keywords)
        x, condition = torch.randn(3, 5, DIM), torch.randn(3, DIM)
        for given in (condition, condition[:, None].expand(-1, 5, -1)):
            close(stack(x, condition=given)[1:2], stack(x[1:2], condition=condition[1:2]))
        assert (stack(x, condition=condition) - stack(x, condition=condition.flip(0))).abs().max() > 1e-4


# ResiDual


def test_resi_dual_formula() -> None:
    stack = Encoder(**{**SMALL, "only_attn": True, "resi_dual": True, "resi_dual_scale": 0.5})
    first, second = stack.branches("a")
    x = torch.randn(2, 5, DIM)
    left, right = x, 0.5 * x
    for branch in (first, second):
        out = branch.attention(left)
        left, right = branch.residual.norm(left + out), right + 0.5 * out
    close(stack(x), left + stack.frame.norm(right))
    assert first.norm is None
    assert stack.final_norm is None


def test_resi_dual_says_where_norms_stand() -> None:
    for more in ({"pre_norm": False}, {"sandwich_norm": True}, {"pre_and_post_norm": True}):
        with pytest.raises(ConfigError, match="`resi_dual` places norms by itself"):
            Decoder(**SMALL, resi_dual=True, **more)


# path scales


@torch.no_grad()
def test_path_scales_formula() -> None:
    stack = decoder(path_scales=True, depth=3, layers_execute_order=(0, 1, 2, 3, 2, 3, 4, 5))
    for part in (stack.frame, *(branch.residual for branch in stack.layers)):
        nn.init.normal_(part.scale)
    x = torch.randn(2, 5, DIM)
    stream, total = x, x * stack.frame.scale
    for index in stack.layers_execute_order:
        branch = stack.layers[index]
        out = branch.fn(branch.norm(stream))
        stream, total = stream + out, total + branch.residual.scale * out
    close(stack(x), stack.final_norm(total))
    # sublayers read the stream without scales
    plain = Decoder(**{**SMALL, "depth": 3, "layers_execute_order": stack.layers_execute_order}).eval()
    plain.load_state_dict({k: v for k, v in stack.state_dict().items() if "residual" not in k and "frame" not in k})
    close(plain(x), stack.final_norm(stream))


def test_path_scales_are_refused_where_the_stream_is_no_sum() -> None:
    for more in ({"pre_norm": False}, {"pre_and_post_norm": True}, {"unet_skips": True}):
        with pytest.raises(ConfigError, match="`path_scales` is a sum of what sublayers add"):
            Decoder(**SMALL, path_scales=True, **more)


# readers of earlier layers


def test_lime_formula() -> None:
    reader = DynamicLIMe(4, 2, num_views=3)
    history = (torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    x = history[-1]
    normed = x / x.norm(dim=-1, keepdim=True) * 2
    weights = (normed @ reader.to_weights.weight.T + reader.to_weights.bias).reshape(1, 3, 3, 2).softmax(dim=-1)
    wanted = torch.stack([weights[..., v, :1] * history[0] + weights[..., v, 1:] * history[1] for v in range(3)])
    close(reader(x, history), wanted)


def test_lime_views_belong_to_every_self_attention_but_the_first() -> None:
    stack = Decoder(**{**SMALL, "depth": 2, "integrate_layers": True, "num_residual_streams": 2})
    assert [branch.reader.views for branch in stack.layers] == [1, 1, 3, 1]
    assert [branch.reader.layers for branch in stack.layers] == [1, 2, 3, 4]


def test_lime_needs_layers_in_order() -> None:
    for more in ({"weight_tie_layers": True}, {"layers_execute_order": (0, 1, 0, 1)}):
        with pytest.raises(ConfigError, match="`integrate_layers` has a weight for each earlier layer"):
            Decoder(**SMALL, integrate_layers=True, **more)
    stack = decoder(integrate_layers=True)
    x = torch.randn(1, 4, DIM)
    assert stack(x, layers_execute_order=(0, 1)).shape == x.shape
    with pytest.raises(InputError, match="must run in order"):
        stack(x, repeat_blocks=(0, 2))


def test_attention_over_layers_formula() -> None:
    reader = perturbed(AttentionResidual(4, num_views=2, lora_rank=2, lora_activation=F.relu))
    assert isinstance(reader, AttentionResidual)
    history = tuple(torch.randn(1, 3, 4) for _ in range(3))
    x = history[-1]

    def rms(t: Tensor, weight: Tensor) -> Tensor:
        return t / (t.square().mean(dim=-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt() * weight

    delta = F.relu(rms(x, reader.input_norm.weight) @ reader.down.weight.T) @ reader.up.weight.T
    for view in range(2):
        query = rms(x + delta[..., 4 * view : 4 * view + 4], reader.query_norm.weight)
        logits = torch.stack([(query * rms(h, reader.key_norm.weight)).sum(dim=-1) / 2 for h in history])
        wanted = sum(p[..., None] * h for p, h in zip(logits.softmax(dim=0), history, strict=True))
        close(reader(x, history)[view], wanted)


def test_attention_over_layers_at_its_start_is_itself_for_equal_layers() -> None:
    x = torch.randn(1, 2, DIM)
    close(AttentionResidual(DIM, lora_rank=2)(x, (x, x, x)), x)


# what belongs together


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"scale_residual": True, "num_residual_streams": 2}, "`scale_residual` needs a plain"),
        ({"scale_residual": True, "mv_split_residual": True}, "`scale_residual` needs a plain"),
        ({"scale_residual_constant": 0.5, "orthog_residual": True}, "`scale_residual_constant` belongs to the plain"),
        ({"gate_residual": True, "orthog_residual": True}, "are alternatives of one choice"),
        ({"gate_residual": True, "num_residual_streams": 2}, "are alternatives of one choice"),
        ({"attn_aggregated_residuals": True, "integrate_layers": True}, "are alternatives of one choice"),
        (
            {
                "attn_aggregated_residuals": True,
                "gate_residual": True,
                "attn_aggregated_residual_kwargs": {"lora_rank": 2},
            },
            "are alternatives of one choice",
        ),
        ({"attn_aggregated_residuals": True}, "`lora_rank` is 64; it must lie between 1 and 7"),
        ({"attn_aggregated_residual_kwargs": {"rank": 2}}, r"names \['rank'\]"),
        ({"qkv_receive_diff_residuals": True}, "`qkv_receive_diff_residuals` needs several streams or layers"),
        (
            {
                "attn_aggregated_residuals": True,
                "attn_aggregated_residual_kwargs": {"lora_rank": 2},
                "num_residual_streams": 2,
                "qkv_receive_diff_residuals": True,
            },
            "drop one of the three",
        ),
        ({"residual_fn_kwargs": {"learned": True}}, "`residual_fn_kwargs` names `learned`.*takes no arguments"),
        (
            {"mv_split_residual": True, "residual_fn_kwargs": {"gamma": 1.0}},
            "names `gamma`.*takes `learned`, `init_alpha`, `init_beta`",
        ),
        ({"num_residual_streams": 0}, "`num_residual_streams` is 0"),
        ({"use_dynamic_tanh": True, "pre_norm": False}, "set `pre_norm = True`"),
        ({"use_dynamic_tanh": True, **GATED}, "drop `gated_multi_residual`"),
        ({"use_layerscale": True, "use_adaptive_layerscale": True}, "are alternatives of one choice"),
    ],
)
def test_refusals(keywords: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**SMALL, **keywords)


def warnings_of(**keywords: object) -> str:
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    Decoder(**{**SMALL, "verbose": True, **keywords})
    logger.remove(handler)
    return "\n".join(said)


def test_scales_without_effect_are_said() -> None:
    aggregated = {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 2}}
    assert "have no effect" in warnings_of(**aggregated, depth_scale_residual=0.5)
    assert "have no effect" not in warnings_of(**aggregated)
    assert "`layer_integrate_use_softmax` has no effect" in warnings_of(layer_integrate_use_softmax=False)
    stack = Decoder(**SMALL, **aggregated, depth_scale_residual=0.5, scale_residual=0.25)
    assert {branch.output_scale for branch in stack.layers} == {1.0}
    assert stack.layers[0].residual.scale is not None


# how outputs start


def test_depth_scale_of_output_maps() -> None:
    stack = Decoder(**{**SMALL, "dim": 64, "depth": 3, "attn_dim_head": 32, "depth_scale_residual": True})
    for index, branch in enumerate(stack.layers):
        block, weight = index // 2 + 1, branch.fn.out.weight if branch.kind.is_self_attention else branch.fn.down.weight
        wanted = (2 * weight.shape[1] * block) ** -0.5
        assert math.isclose(weight.std().item(), wanted, rel_tol=0.1)


def test_numbers_scale_outputs_and_the_depth_scale_wins() -> None:
    assert Decoder(**SMALL, depth_scale_residual=0.5, scale_residual=0.25).layers[0].output_scale == 0.5
    assert Decoder(**SMALL, scale_residual=0.25).layers[0].output_scale == 0.25
    assert Decoder(**SMALL, depth_scale_residual=True, scale_residual=0.25).layers[0].output_scale == 0.25


def test_zero_outputs_make_the_stack_its_final_norm() -> None:
    for more in ({}, {"depth_scale_residual": True}, {"ff_glu": True}):
        stack = CrossAttender(**{**SMALL, "zero_init_branch_output": True, **more})
        x = torch.randn(2, 4, DIM)
        close(stack(x, context=x), F.layer_norm(x, (DIM,)))
    with pytest.raises(ConfigError, match="no output projection to initialize"):
        Decoder(dim=4, depth=1, heads=1, attn_dim_head=4, zero_init_branch_output=True)


@torch.no_grad()
def test_output_clamp_stands_before_the_sum_of_streams_and_the_final_norm() -> None:
    stack = decoder(num_residual_streams=2, softclamp_output=True, softclamp_output_value=0.5)
    plain = decoder(num_residual_streams=2)
    plain.load_state_dict(stack.state_dict())
    x = torch.randn(1, 4, DIM)
    _, record = plain(x, return_hiddens=True)
    streams = record.layer_hiddens[-1].unflatten(0, (1, 2))
    wanted = (0.5 * torch.tanh(streams / 0.5)).sum(dim=1)
    close(stack(x), plain.final_norm(wanted))


# segments


@pytest.mark.parametrize(
    "keywords",
    [
        {"mv_split_residual": True, "residual_fn_kwargs": {"init_alpha": 0.5, "init_beta": 0.8}},
        {"shift_tokens": 2},
        {"num_residual_streams": 2, "qkv_receive_diff_residuals": True, "shift_tokens": 1},
        {"integrate_layers": True},
        {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 2}},
        {"reinject_input": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_segments_with_memory_are_one_pass(keywords: dict) -> None:
    stack = Decoder(**SMALL, rotary_pos_emb=True, **keywords)
    model = perturbed(TransformerWrapper(num_tokens=12, max_seq_len=32, max_mem_len=32, attn_layers=stack))
    ids = torch.randint(0, 12, (2, 9))
    mems, outputs = None, []
    for start, end in ((0, 3), (3, 7), (7, 9)):
        out, mems = model(ids[:, start:end], mems=mems, return_mems=True)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), model(ids))
