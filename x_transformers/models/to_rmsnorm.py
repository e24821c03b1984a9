"""Cheaper norms for trained models: LayerNorms become RMSNorms or CRMSNorms, and outputs stay the same (2305.14858).

LayerNorm subtracts the mean of the features before it divides by their deviation. If everything that writes the
residual stream has mean 0, there is no mean to subtract, and RMSNorm with the same epsilon and gains does the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.head_maps import HeadOutput
from x_transformers.errors import ConfigError, Faults
from x_transformers.feedforward.experts import Experts
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.folders.saved import SavesFolders
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.shared_norm import SharedNorm
from x_transformers.layers.experts import TrainsExperts, stack_of
from x_transformers.layers.residuals.plain import Residual
from x_transformers.layers.stack import LayerStack
from x_transformers.models.base import Model
from x_transformers.models.continuous import ContinuousTransformerWrapper
from x_transformers.models.embeddings import AbsolutePositionalEmbedding, TokenEmbedding, table_of
from x_transformers.models.heads import BiasedLinear, Heads, LinearNoBias, TiedLogits
from x_transformers.models.to_experts import mult_for
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.models.vision import ViTransformerWrapper
from x_transformers.modules.norms import GainNorm, LayerNorm
from x_transformers.options.values import shown

Net = TypeVar("Net", bound=SavesFolders)

MAPS = (nn.Linear, LinearNoBias, BiasedLinear)
"""Classes whose `weight (out, in)` and `bias (out,)` are all that they compute with."""

Writers = dict[str, int]
"""Entries of a state dict that write the residual stream, with the axis of its features."""


def to_rmsnorm(model: Net, **objects: Any) -> Net:
    """Return a model that computes the same with RMSNorms instead of LayerNorms.

    The mean over features is subtracted from everything that writes the residual stream: embeddings, positions, memory
    and class tokens, and the output maps of sublayers with their biases. Epsilon and gains of the norms stay. The model
    is the same in evaluation; in training, dropout of features that were written leaves another mean than 0. Embeddings
    that callers pass (`prepend_embeds`, `sum_embeds`, floating `pos`) must have mean 0. A head that is tied to the
    table of tokens gets weights of its own, unless a linear map is between table and stream.

    Args:
        model: a `TransformerWrapper`, `ContinuousTransformerWrapper` or `ViTransformerWrapper`. It is not changed.
        objects: arguments of the constructors that are no plain data, as `from_config` takes them.

    Returns:
        A new model of the same class.

    Raises:
        ConfigError: listing everything because of which the stream has another mean, or is read without a LayerNorm.
    """
    stack, faults = _stack(model), Faults()
    _check_norms(stack, faults)
    _check_stream(stack, faults)
    writers = _writers(model, stack, faults)
    faults.raise_if_any("to_rmsnorm")
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    final = stack.final_norm
    assert isinstance(final, LayerNorm)
    options = config["options"]
    options["attn_layers"]["options"] |= {"use_rmsnorm": True, "norm_eps": final.eps}
    head = model.to_logits if isinstance(model, TransformerWrapper) else None
    if isinstance(model, TransformerWrapper) and isinstance(head, TiedLogits) and model.project_emb is None:
        options["tie_embedding"] = False
        options.pop("tie_embedding_scale", None)
        state["to_logits.weight"] = table_of(model.token_emb).detach() * head.scale
    for name, axis in writers.items():
        state[name] = _centered(state[name], axis)
    return _loaded(model, config, state, objects)


def to_crmsnorm(model: Net, **objects: Any) -> Net:
    """Return a model of one feature less that computes the same with CRMSNorms instead of LayerNorms.

    The last feature of a stream of mean 0 is minus the sum of the others, so that it need not be kept: after
    `to_rmsnorm`, maps that write the stream lose their last output, and maps W that read it become `W[:, :-1] -
    W[:, -1:]`, after the gains of the norms have been multiplied into them. What callers pass and get (embeddings,
    features, memories) loses its last feature, too.

    Args:
        model: as for `to_rmsnorm`, with a head. It is not changed.
        objects: arguments of the constructors that are no plain data, as `from_config` takes them.

    Returns:
        A new model of the same class, whose stack has a `dim` that is smaller by 1.

    Raises:
        ConfigError: if the model cannot be converted by `to_rmsnorm`, or a part of it reads or writes the stream by
            something else than a linear map.
    """
    centered = to_rmsnorm(model, **objects)
    stack, faults = _stack(centered), Faults()
    heads = _heads(centered, faults)
    if getattr(centered, "exit_norms", None) is not None:
        faults.add("`exit_norms` are several norms before one head, into which only one can be multiplied; drop it.")
    for branch in stack.sublayers:
        if branch.shift is not None:
            faults.add("`shift_tokens` moves groups of features, of which the last would be another; drop it.")
        if "rational" in branch.fn.features:
            faults.add("`ff_rational` applies activations to the features of the stream; use `to_rmsnorm`.")
        if "hybrid" in branch.fn.features:
            faults.add("`attn_hybrid_module` reads all features of the stream; use `to_rmsnorm`.")
    faults.raise_if_any("to_crmsnorm")
    config = copy.deepcopy(centered.config)
    _narrow(config["options"], centered, stack)
    found = _new(centered, config, objects)
    state, wanted = dict(centered.state_dict()), found.state_dict()
    writers, readers = _writers(centered, stack, faults), _readers(state, stack, heads)
    unknown = sorted(state.keys() ^ wanted.keys())
    for name in state.keys() & wanted.keys():
        old, new = state[name], wanted[name]
        if old.shape == new.shape:
            continue
        if name in writers:
            state[name] = old.narrow(writers[name], 0, stack.dim - 1)
        elif name in readers:
            rows = old.double() * readers[name].double()
            state[name] = (rows[..., :-1] - rows[..., -1:]).to(old.dtype)
        elif old.ndim == 1 and name.endswith("norm.gamma"):
            state[name] = new
        if state[name].shape != new.shape:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} others" if len(unknown) > 3 else ""
        faults.add(
            f"{', '.join(f'`{name}`' for name in unknown[:3])}{more} depend on the width of the stream in another way "
            "than as linear maps from a norm or to the stream; use `to_rmsnorm`."
        )
    faults.raise_if_any("to_crmsnorm")
    found.load_state_dict(state)
    return found


def _stack(model: Any) -> LayerStack:
    """Return the stack of a model.

    Raises:
        ConfigError: if it is a model whose embeddings are not known.
    """
    known = TransformerWrapper, ContinuousTransformerWrapper, ViTransformerWrapper
    if not isinstance(model, known) or not isinstance(model, TrainsExperts):
        raise ConfigError(
            f"`model` is {shown(model)}; it must be a {known[0].__name__}, {known[1].__name__} or {known[2].__name__}. "
            "A stack by itself reads embeddings that were made elsewhere, and cannot center them."
        )
    return stack_of(model)


def _new(model: Net, config: dict[str, Any], objects: Mapping[str, Any]) -> Net:
    """Build a model with the device, dtype and mode of another one."""
    found = type(model).from_config(config, **objects)
    like = next(model.parameters())
    return found.to(like.device, like.dtype).train(model.training)


def _loaded(model: Net, config: dict[str, Any], state: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Net:
    found = _new(model, config, objects)
    found.load_state_dict(state)
    return found


def _centered(t: Tensor, axis: int) -> Tensor:
    """Return a tensor minus its mean over an axis."""
    wide = t.double()
    return (wide - wide.mean(dim=axis, keepdim=True)).to(t.dtype)


# what reads the stream


def _check_norms(stack: LayerStack, faults: Faults) -> None:
    """Add a fault for each place where the stream is read without a LayerNorm."""
    before = [_norm_of(branch) for branch in stack.sublayers]
    norms = [*before, stack.final_norm]
    for norm in norms:
        if norm is not None and type(norm) is not LayerNorm:
            faults.add(f"it replaces LayerNorms, and the model has {type(norm).__name__}; use one with LayerNorms.")
        elif norm is not None and norm.bias is not None:
            faults.add("`norm_bias` is a bias of LayerNorm, which other norms do not have; train without it.")
    if any(norm is None for norm in norms):
        faults.add(
            "every sublayer and the output must read the stream through a norm, which ignores its mean; use "
            "`pre_norm = True` with a first and a final norm."
        )
    if any(branch.stream_norm is not None or branch.output_norm is not None for branch in stack.sublayers):
        faults.add(
            "norms after the residual or of the outputs of sublayers have gains, with which the mean of the stream is "
            "not 0; use `pre_norm = True` only."
        )


def _norm_of(branch: Branch) -> nn.Module | None:
    """Return the norm before a sublayer, also if it belongs to another one."""
    norm = branch.norm
    while isinstance(norm, SharedNorm):
        norm = getattr(norm.owner, norm.name)
    return norm


# what writes the stream


def _check_stream(stack: LayerStack, faults: Faults) -> None:
    """Add a fault for each part of a stack that would not keep a mean of 0."""
    for branch in stack.sublayers:
        residual = branch.residual
        if type(residual) is not Residual or residual.scale is not None:
            name = "`scale_residual`" if type(residual) is Residual else type(residual).__name__
            faults.add(
                f"the stream must keep a mean of 0, and {name} does more than to add outputs to it; use the plain "
                "residual connection without a learned scale."
            )
        if branch.scale is not None:
            faults.add(
                "the stream must keep a mean of 0, and learned scales of outputs have a factor for each feature; drop "
                "`use_layerscale` and `use_adaptive_layerscale`."
            )
        if branch.reader is not None:
            faults.add(f"{type(branch.reader).__name__} reads the stream without its norm; use a stack without it.")
    if stack.skip_sources:
        faults.add("`unet_skips` maps the stream itself, whose mean of 0 would be lost; drop it.")
    if stack.output_clamp is not None:
        faults.add("`softclamp_output` bounds the features one by one, so that their mean is not 0; drop it.")
    if stack.depth_routers is not None:
        faults.add("routers of `depth_routing` read the stream without a norm; drop it.")
    if stack.injection is not None:
        faults.add("`reinject_input` and its gate read the stream without a norm; drop them.")


def _writers(model: nn.Module, stack: LayerStack, faults: Faults) -> Writers:
    """Return the entries of a model that write the stream, with the axis of its features."""
    found = _writers_of_images(model, faults) if isinstance(model, ViTransformerWrapper) else {}
    if isinstance(model, Model):
        found = _writers_of_items(model, faults)
    for name in ("memory_tokens", "cls_token", "register_tokens"):
        if getattr(model, name, None) is not None:
            found[name] = -1
    for index, branch in enumerate(stack.sublayers):
        prefix = f"attn_layers.layers.{index}.{branch.kind.module_name}"
        found |= _writers_of_function(branch.fn, prefix, faults)
    return found


def _writers_of_function(fn: nn.Module, prefix: str, faults: Faults) -> Writers:
    """Return the entries of the output map of a sublayer."""
    if type(fn) is Attention and isinstance(fn.out, HeadOutput):
        return {f"{prefix}.out.weight": -1} | ({} if fn.out.bias is None else {f"{prefix}.out.bias": -1})
    if type(fn) is Attention:
        found = _writers_of_map(fn.out, f"{prefix}.out", "the output of attention", faults)
        if fn.heavy is not None:
            inner = f"{prefix}.heavy"
            found |= _writers_of_map(
                fn.heavy.attention.out, f"{inner}.attention.out", "the output of attention", faults
            )
            found |= {} if fn.heavy.null is None else {f"{inner}.null": -1}
        return found
    if type(fn) is FeedForward:
        return _writers_of_map(fn.down, f"{prefix}.down", "the output of a feedforward", faults)
    if type(fn) is Experts:
        found = {f"{prefix}.down": -2} | ({} if fn.down_bias is None else {f"{prefix}.down_bias": -1})
        if fn.shared is not None:
            found |= _writers_of_map(fn.shared.down, f"{prefix}.shared.down", "the output of an expert", faults)
        return found
    faults.add(
        f"a sublayer runs {type(fn).__name__}, whose output cannot be centered; only attention, feedforwards and "
        "experts have an output map that can."
    )
    return {}


def _writers_of_map(module: nn.Module, name: str, words: str, faults: Faults) -> Writers:
    """Return the entries of a linear map that writes the stream."""
    if type(module) not in MAPS or type(module.weight) is not nn.Parameter:
        faults.add(
            f"{words} comes from {type(module).__name__}, and must come from a linear map by itself, which can be "
            "centered."
        )
        return {}
    return {f"{name}.weight": -2} | ({} if module.bias is None else {f"{name}.bias": -1})


def _writers_of_images(model: ViTransformerWrapper, faults: Faults) -> Writers:
    """Return the entries of patches and their positions."""
    if not isinstance(model.patch_to_embedding[2], nn.Identity) or model.post_emb_norm is not None:
        faults.add(
            "a norm of the embeddings has gains, with which their mean is not 0; build the model with "
            "`patch_norm = False` and without `post_emb_norm`."
        )
    patches = _writers_of_map(model.patch_to_embedding[1], "patch_to_embedding.1", "an embedding", faults)
    return {"pos_embedding": -1, **patches}


def _writers_of_items(model: Model, faults: Faults) -> Writers:
    """Return the entries of embeddings and positions, or of the map that follows them."""
    for name in ("recycling", "looped"):
        if getattr(model, name, False):
            faults.add(f"`{name}` reads the output of the stack again, whose mean is not 0; drop it.")
    if getattr(model, "ff_deep_embed", None) is not None:
        faults.add("`ff_deep_embed` multiplies features of outputs, whose mean is then not 0; drop it.")
    if model.project_emb is not None:
        return _writers_of_map(model.project_emb, "project_emb", "an embedding", faults)
    if model.post_emb_norm is not None:
        faults.add("`post_emb_norm` has gains, with which the mean of the embeddings is not 0; drop it.")
    found: Writers = {}
    positions = model.pos_emb
    if isinstance(positions, AbsolutePositionalEmbedding) and not positions.l2norm_embed:
        found["pos_emb.emb.weight"] = -1
    elif positions is not None:
        faults.add(
            "only learned positions can be centered; drop `scaled_sinu_pos_emb` and `l2norm_embed`, or use rotary "
            "positions."
        )
    if isinstance(model, ContinuousTransformerWrapper):
        if model.dim_in is None or isinstance(model.project_in, nn.Identity):
            faults.add("the stack reads vectors that were made elsewhere, and cannot center them; pass `dim_in`.")
            return found
        return found | _writers_of_map(model.project_in, "project_in", "an embedding", faults)
    assert isinstance(model, TransformerWrapper)
    if not model.own_token_emb or type(model.token_emb) is not TokenEmbedding:
        faults.add("only a `TokenEmbedding` of the model's own can be centered; drop `token_emb`.")
        return found
    if type(model.token_emb.emb) is not nn.Embedding or model.l2norm_embed:
        faults.add("`l2norm_embed` and adapters change the rows of the table, so that their mean is not 0; drop them.")
    return {"token_emb.emb.weight": -1, **found, **{f"embeds.{name}.weight": -1 for name in model.embeds}}


# one feature less


def _heads(model: nn.Module, faults: Faults) -> list[str]:
    """Return the names of the maps that read the output of the stack."""
    if isinstance(model, ViTransformerWrapper):
        name, head = "mlp_head", model.mlp_head
    elif isinstance(model, ContinuousTransformerWrapper):
        name, head = "project_out", nn.Identity() if model.dim_out is None else model.project_out
    else:
        assert isinstance(model, TransformerWrapper)
        name, head = "to_logits", model.to_logits if model.own_to_logits else None
    if isinstance(head, Heads):
        return [f"{name}.{index}" for index in range(len(head))]
    if type(head) not in MAPS:
        faults.add(
            "the features of the model lose one of them, so that its output must come from a linear head of its own; "
            "use `to_rmsnorm`, or build the model with such a head."
        )
    return [name]


def _narrow(options: dict[str, Any], model: nn.Module, stack: LayerStack) -> None:
    """Change the options of a model to a width that is smaller by 1; all other widths stay."""
    width = stack.dim - 1
    of_stack = options["attn_layers"]["options"]
    of_stack |= {"dim": width, "use_rmsnorm": False, "use_crmsnorm": True}
    functions = [branch.fn for branch in stack.sublayers if branch.kind.is_feedforward]
    if functions:
        of_stack["ff_mult"] = tuple(mult_for(_inner(fn), width) for fn in functions)
        shared = [getattr(fn, "shared", None) for fn in functions]
        if any(shared):
            of_stack["ff_shared_mult"] = tuple(
                0.0 if fn is None else mult_for(fn.down.in_features, width) for fn in shared
            )
    crossing = stack.attentions("c")
    if crossing:
        of_stack["cross_attn_dim_context"] = tuple(fn.dim_context for fn in crossing)
    if isinstance(model, Model) and model.project_emb is None:
        if isinstance(model, TransformerWrapper):
            options["emb_dim"] = None
        if isinstance(model.pos_emb, AbsolutePositionalEmbedding):
            options["abs_pos_emb_scale"] = model.pos_emb.scale


def _inner(fn: nn.Module) -> int:
    """Return the inner width of a feedforward or of one of its experts."""
    if isinstance(fn, Experts):
        return fn.inner
    assert isinstance(fn, FeedForward)
    return fn.down.in_features


def _readers(state: Mapping[str, Tensor], stack: LayerStack, heads: Iterable[str]) -> dict[str, Tensor]:
    """Return the entries that read a norm, with its gains `(D,)`."""
    found = {}
    for index, branch in enumerate(stack.sublayers):
        prefix = f"attn_layers.layers.{index}.{branch.kind.module_name}."
        found |= {
            name: _gain(_norm_of(branch))
            for name, t in state.items()
            if name.startswith(prefix) and t.ndim >= 2 and t.shape[-1] == stack.dim
        }
    return found | {f"{name}.weight": _gain(stack.final_norm) for name in heads}


def _gain(norm: nn.Module | None) -> Tensor:
    assert isinstance(norm, GainNorm)
    return norm.gain().detach()
