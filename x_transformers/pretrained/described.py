"""Keywords of a model in one form, which is the same for all models that compute the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from x_transformers.errors import ConfigError, Faults
from x_transformers.layers.kinds import KINDS
from x_transformers.layers.plan import LayerPlan, StackPlan, make_plan
from x_transformers.mixers.catalog import defaults_of, keywords_of
from x_transformers.models.options.catalog import TRANSFORMER
from x_transformers.options.schema import Options

TRAINING = """
    attn_attend_sdp_kwargs attn_dropout attn_flash attn_onnxable attn_output_proj_depth attn_sublayer_dropout
    attn_z_loss_weight attn_zero_init_output checkpoint_every emb_dropout emb_frac_gradient ff_dropout
    ff_balance_loss_per_row ff_balance_loss_weight ff_expert_dropout ff_router_entropy_weight ff_router_z_loss_weight
    ff_output_proj_depth ff_sublayer_dropout ff_zero_init_output input_not_include_cache layer_dropout max_mem_len
    mixer_chunk mixer_dropout mixer_output_proj_depth mixer_zero_init_output shift_mem_down verbose
    zero_init_branch_output
"""
"""Keywords of training, of the first weights, and of how the same is computed."""

IN_OTHER_WORDS = """
    attn_one_kv_head attn_project_out attn_value_dim_head cross_attend custom_layers depth disable_abs_pos_emb emb_dim
    ff_custom_activation ff_dim_out ff_glu_no_bias ff_mult ff_no_bias ff_relu_squared ff_shared_mult ff_solu ff_swish
    layer_period layers_execute_order macaron max_seq_len mixer_dim mixer_dim_key mixer_dim_value mixer_expand
    mixer_step_rank num_tokens only_attn only_cross par_ratio sandwich_coef use_abs_pos_emb weight_tie_layers
"""
"""Keywords that are in `layers`, in another keyword, or in the names and shapes of the weights."""

NOT_COMPARED = frozenset(f"{TRAINING} {IN_OTHER_WORDS}".split())


STACKS = ("Decoder", "Encoder")
WITHOUT_EFFECT = {"emb_scale": 1.0, "logits_scale": 1.0, "depth_scale_residual": 1.0}
"""Values with which a keyword changes nothing."""


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a model with the defaults of those that were not given.

    Keywords of features that are off are left out; those of the sublayers of one kind are one value if all are equal,
    and otherwise a tuple.

    Args:
        config: of a `TransformerWrapper`.

    Raises:
        ConfigError: if it is another model, or contains objects of the user's.
    """
    inner = config["options"].get("attn_layers", {}).get("class")
    if config["class"] != "TransformerWrapper" or inner not in STACKS:
        hint = "; save its `net`" if "net" in config["options"] else ""
        found = config["class"] if config["class"] != "TransformerWrapper" else f"one with a stack of the class {inner}"
        raise ConfigError(
            f'`format = "hf"` needs a TransformerWrapper with a Decoder or Encoder; this is {found}{hint}.'
        )
    given = {name: value for name, value in config["options"].items() if name != "attn_layers"}
    stack = dict(config["options"]["attn_layers"]["options"])
    for name, value in {**given, **stack}.items():
        if isinstance(value, Mapping) and "$object" in value:
            raise ConfigError(f'`format = "hf"` cannot contain `{name}`, an object of your own.')
    faults = Faults()
    model = TRANSFORMER.parse({name: value for name, value in given.items() if name in TRANSFORMER.owner}, faults)
    faults.raise_if_any(config["class"])
    dim = stack.pop("dim")
    plan = make_plan(inner, {"depth": None, "heads": 8, **stack})
    words: dict[str, Any] = {name: given[name] for name in ("num_tokens", "max_seq_len")}
    words |= {"stack": inner, "dim": dim, "depth": plan.sequence.depth, "layers": "".join(plan.sequence.kinds)}
    if tuple(plan.sequence.order) != tuple(range(len(plan.sequence.kinds))):
        words["layers"] = tuple(plan.sequence.order)
    words |= dict(_on(model)) | dict(_on(plan.options))
    for letter, kind in KINDS.items():
        layers = plan.of(letter)
        words |= _joined([_of_layer(layer, words["heads"]) for layer in layers], kind.prefix)
        if layers and kind.chosen_by is not None:
            words[kind.chosen_by] = _one_of(tuple(layer.keywords[kind.chosen_by] for layer in layers))
    return _resolved(words, plan)


def _on(options: Options, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keywords of the features that are on, with their values."""
    for feature in options.enabled():
        values = options[feature.name]
        idle = set(feature.idle(values))
        for name in vars(values):
            if name not in idle:
                yield prefix + name, getattr(values, name)


def _of_layer(layer: LayerPlan, heads: int) -> dict[str, Any]:
    """Return the keywords of one layer, without prefix; of a mixer those that it reads, and its own defaults."""
    if layer.kind.chosen_by is None:
        return dict(_on(layer.options))
    name, owner = layer.keywords[layer.kind.chosen_by], layer.kind.schema.owner
    given = {keyword: getattr(layer.options[owner[keyword].name], keyword) for keyword in sorted(keywords_of(name))}
    own = defaults_of(name) | {keyword: value for keyword, value in given.items() if value is not None}
    if "heads" in given and given["heads"] is None:
        own["heads"] = heads
    if "key_heads" in own and own["key_heads"] is None:
        own["key_heads"] = own["heads"]
    return own


def _joined(each: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """Return keywords of layers with a prefix: a value, or one for each layer."""
    names = dict.fromkeys(name for options in each for name in options)
    return {prefix + name: _one_of(tuple(options.get(name) for options in each)) for name in names}


def _one_of(values: tuple[Any, ...]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else values


def _resolved(words: dict[str, Any], plan: StackPlan) -> dict[str, Any]:
    """Replace defaults that depend on other keywords by their values, and several names of one thing by one."""
    dim, dim_head = words["dim"], words.get("attn_dim_head")
    # without attention, the heads are those of mixers
    attends = dim_head is not None
    heads = words["heads"] if attends else words.pop("heads")
    defaults = {
        "attn_kv_heads": 1 if words.get("attn_one_kv_head") else heads,
        "attn_scale": dim_head**-0.5 if isinstance(dim_head, int) else None,
        "norm_eps": 1e-24 if words.get("use_rmsnorm") else 1e-5,
        "rotary_emb_dim": words.get("attn_latent_rope_dim"),
        "tie_embedding_scale": dim**-0.5 if words.get("tie_embedding") else None,
        "abs_pos_emb_scale": dim**-0.5,
    }
    if defaults["rotary_emb_dim"] is None and isinstance(dim_head, int):
        defaults["rotary_emb_dim"] = max(2, dim_head // 2 + dim_head // 2 % 2)
    needed = {"norm_eps", "tie_embedding_scale", *(("attn_kv_heads", "attn_scale") if attends else ())} | words.keys()
    words |= {name: value for name, value in defaults.items() if words.get(name) is None and name in needed}
    if "ff_experts" in words:
        normalized = (layer.options["experts"] for layer in plan.of("f") if layer.options.on("experts"))
        words["ff_router_normalize"] = _one_of(tuple(each.normalizes for each in normalized))
    words["ff_activation"] = _one_of(tuple(map(_activation, plan.of("f"))))
    scale = words.get("attn_scale")
    if isinstance(scale, tuple):
        words["attn_scale"] = tuple(defaults["attn_scale"] if each is None else each for each in scale)
    if words.get("depth_scale_residual") is True:
        # concerns the first weights only
        del words["depth_scale_residual"]
    return {name: value for name, value in words.items() if name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]}


def _activation(layer: LayerPlan) -> str:
    """Return the name of the activation of a feedforward."""
    options = layer.options["activation"]
    first = next(iter(options.ranked()), "gelu")
    return {"swish": "silu", "activation": str(options.activation)}.get(first, first)


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keywords in which models differ, with both values.

    Args:
        one, two: as `described` returns them.
    """
    names = [name for name in {**one, **two} if name not in NOT_COMPARED]
    return {name: (one.get(name), two.get(name)) for name in names if not _equal(one.get(name), two.get(name))}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_equal, one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_equal(value, two[name]) for name, value in one.items())
    if isinstance(one, int | float) and isinstance(two, int | float) and not isinstance(one, bool):
        return math.isclose(one, two, rel_tol=1e-9)
    return bool(one == two)
