"""Scripts of the reference find their imports: every name and every parameter of its surface, or a reason why not.

The surface is read from the folder of reference data next to the checkout.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NEWER_MODULES = {
    "discover_wrapper": "TPREncoder DiscoverDecoder num_roles_for_scheme role_ids_for_tokens ROLE_SCHEMES",
    "free_transformer": "BinaryMapper FreeTransformer NAT",
    "full_bandwidth": "FullBandwidth LossBreakdown GLUCrossTransition ResidualTransition GRUGatingTransition "
    "LinearTransition ResidualGLUTransition uniform_like shift_and_fuse_latents fuse_last_latent "
    "dynamic_rollout_loss_weights resolve_transition resolve_recirc_pairs get_block_latent TRANSITIONS "
    "RECIRC_SHORTCUTS",
    "gpt_lejepa": "LatentAutoregressive",
    "gpt_vae": "GPTVAE",
    "next_latent_wrapper": "NextLatentWrapper ResidualDynamics RolloutGRU MSECosineSimLoss Losses MLP",
    "recirculation": "Recirculation RecirculationMixer norm_matched logit",
    "up_wrapper": "SyntheticDataGenerator UniversalPretrainWrapper random_sequences",
    "xm_latent_decoder": "XMLatentDecoder lowest_loss_winner_fn",
}
"""Modules whose signatures are compared elsewhere, and their most important names."""

RECORDS = ("Intermediates", "LayerIntermediates")
"""They are returned and never built; what they hold has the reference's names."""

NAMES_LEFT_OUT = {
    "DetachMultiple": "splits a gradient to save memory; ours is ordinary backpropagation",
    **dict.fromkeys(
        (
            "Recirculation.max_seq_len",
            "Recirculation.add_continuous_pred_head",
            "Recirculation.can_cache_kv",
            "Recirculation.can_cache_kv_outside_max_seq_len",
            "Recirculation.looped",
            "Recirculation.output_is_log_prob",
        ),
        "an attribute of the model, which objects of the class have",
    ),
}

PARAMETERS_LEFT_OUT = {
    **dict.fromkeys(("default.val", "default.d"), "it takes any number of values, as `x_transformers.default` there"),
    "AttentionResidual.forward.past_deltas": "what it reads is `hiddens`; nothing else is described",
}

OTHER_DEFAULTS = {
    "log.eps": "1e-20 in every module; in one it is 1e-10 there, which float32 does not need",
    "Attention.flash": "None: the fastest backend that hosts the options",
    "AttentionLayers.forward.cache_age": "None: every token that is not cached; 1 would drop tokens silently",
    "TransformerWrapper.forward.attn_z_loss_weight": "None: the constructor's, which would have no effect otherwise",
    "MultiInputTransformerWrapper.forward.attn_z_loss_weight": "None: the constructor's",
    "AttentionResidual.forward.hiddens": "a sequence, which may not be empty",
}


class Entry(NamedTuple):
    """A line of the surface: a class, method, property, function or constant, and its parameters if it has some."""

    module: str
    name: str
    parameters: str | None

    def __str__(self) -> str:
        return self.name


def entries(text: str) -> Iterator[Entry]:
    module = owner = ""
    for line in text.splitlines():
        if found := re.match(r"## `([\w.]+)`", line):
            module = found[1]
        elif not module:
            continue
        elif found := re.match(r"- class `(\w+)`(?:\((.*)\))?$", line):
            owner = found[1]
            yield Entry(module, owner, found[2])
        elif found := re.match(r"  - (?:property )?`(\w+)`(?:\((.*)\))?$", line):
            yield Entry(module, f"{owner}.{found[1]}", found[2])
        elif found := re.match(r"- (functions|constants): (.*)", line):
            for name, parameters in re.findall(r"`(\w+)(?:\(([^`]*)\))?`", found[2]):
                yield Entry(module, name, parameters if found[1] == "functions" else None)
        elif line.startswith("`"):
            for name in re.findall(r"`(\w+)`", line):
                yield Entry(module, name, None)


def split(parameters: str) -> list[str]:
    """`a, b={1, 2}, c=', '` to its parts."""
    parts, depth, quoted = [""], 0, False
    for character in parameters:
        depth += (character in "([{<") - (character in ")]}>")
        quoted ^= character == "'"
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@pytest.fixture(scope="module")
def surface(shared: Path) -> list[Entry]:
    path = shared / "spec" / "api.md"
    if not path.is_file():
        pytest.skip("no list of the reference's names in the folder of reference data")
    return list(entries(path.read_text(encoding="utf-8")))


def find(entry: Entry) -> Any:
    """Return the object that the entry names, or None."""
    target: Any = importlib.import_module(entry.module)
    for name in entry.name.split("."):
        target = getattr(target, name, None)
    return target


def test_every_name_exists_or_is_left_out_for_a_reason(surface: list[Entry]) -> None:
    assert len(surface) > 250
    missing = {e.name for e in surface if find(e) is None and e.name.split(".")[0] not in NAMES_LEFT_OUT}
    assert missing - set(NAMES_LEFT_OUT) == set()
    # a reason that has lost its name is no reason
    assert {name for name in NAMES_LEFT_OUT if all(find(e) is not None for e in surface if e.name == name)} == set()


def test_newer_modules_have_their_names() -> None:
    for module, names in NEWER_MODULES.items():
        found = importlib.import_module(f"x_transformers.{module}")
        assert all(hasattr(found, name) for name in names.split()), module


def faults(entry: Entry) -> Iterator[tuple[str, str]]:
    """Where calls in the reference's form would go wrong: the parameter, and what is wrong."""
    target = find(entry)
    if target is None or entry.parameters is None or not callable(target) or entry.name in RECORDS:
        return
    given = split(entry.parameters)
    ours = {name: p for name, p in inspect.signature(target).parameters.items() if name != "self"}
    is_class = inspect.isclass(target) or "." in entry.name
    takes_any = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    places = [name for name, p in ours.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = not hasattr(target, "__signature__") or not inspect.isclass(target)
    for place, part in enumerate(given):
        name, _, default = part.partition("=")
        if name.startswith("*"):
            positional = False
            continue
        label = f"{entry.name}.{name}"
        if positional and place < len(places) and not is_class:
            name = places[place]  # functions are called by place
        if name not in ours:
            positional = False
            if not takes_any:
                yield label, "there is no such parameter"
            continue
        if positional and is_class and (place >= len(places) or places[place] != name):
            yield label, f"it is parameter {place} there, here those are {places}"
        own = ours[name].default
        if default and own is inspect.Parameter.empty:
            yield label, f"it is optional there, {default}"
        elif default and not same(default, own):
            yield label, f"its default is {default} there, {own!r} here"


def same(default: str, own: Any) -> bool:
    """Return True if a default is the one of the surface; None may replace a dictionary or another object."""
    if default == repr(own) or default.startswith("<") or default == "...":
        return True
    return (own is None and default.startswith("{")) or default == getattr(own, "__name__", None)


def test_signatures_match(surface: list[Entry]) -> None:
    newer = {f"x_transformers.{name}" for name in NEWER_MODULES}
    compared = [entry for entry in surface if entry.module not in newer and entry.name not in NAMES_LEFT_OUT]
    found = dict(fault for entry in compared for fault in faults(entry))
    known = {**PARAMETERS_LEFT_OUT, **OTHER_DEFAULTS}
    assert {name: words for name, words in found.items() if name not in known} == {}
    assert set(known) - set(found) == set(), "these have the reference's form by now"


def test_differences_are_found() -> None:
    """The comparison itself, on a name that has another form."""
    module = "x_transformers.x_transformers"
    assert [name for name, _ in faults(Entry(module, "LoRALinear", "dim_in, other=1, dim=3"))] == [
        "LoRALinear.other",
        "LoRALinear.dim",
    ]
    assert [name for name, _ in faults(Entry(module, "LoRALinear", "dim_out=None, dim_in"))] == [
        "LoRALinear.dim_out",
        "LoRALinear.dim_in",
    ]
    assert find(Entry(module, "NoSuchName", None)) is None


def test_modules_of_the_reference_export_their_names() -> None:
    """`from x_transformers.x_transformers import *` exports each name once."""
    for name in ("x_transformers", "attend", "autoregressive_wrapper"):
        module = importlib.import_module(f"x_transformers.{name}")
        assert all(hasattr(module, public) for public in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)
