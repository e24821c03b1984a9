"""How much of the library a pass goes through, and how long its classes and parameter lists may be.

`python tests/house.py` prints the figures, and with `--trace` every call of a forward pass.
"""

import functools
import importlib

import pytest
from house import PACKAGE, Trace, calls_of_a_token, classes, parameter_lists, trace_forward

import x_transformers

CALLS, FILES, CHANGES, DEPTH = 70, 16, 35, 9
"""One forward pass of a decoder of one block, from token ids to logits."""
CALLS_OF_A_TOKEN = 170
LINES_OF_A_CLASS = 350
PARAMETERS = 12

LONG_SIGNATURES = frozenset(
    {
        "Attention.forward",
        "AttentionLayers.forward",
        "AutoregressiveWrapper.__init__",
        "AutoregressiveWrapper.beam_search",
        "AutoregressiveWrapper.generate",
        "ContinuousTransformerAutoencoder.__init__",
        "ContinuousTransformerWrapper.__init__",
        "ContinuousTransformerWrapper.forward",
        "FreeTransformer.__init__",
        "GPTVAE.__init__",
        "LatentAutoregressive.__init__",
        "MultiInputTransformerWrapper.__init__",
        "MultiInputTransformerWrapper.forward",
        "NextLatentWrapper.__init__",
        "NonAutoregressiveWrapper.__init__",
        "TransformerWrapper.__init__",
        "TransformerWrapper.forward",
        "XLAutoregressiveWrapper.__init__",
        "XMLatentDecoder.__init__",
        "XValTransformerWrapper.__init__",
        "XValTransformerWrapper.forward",
    }
)
"""Public signatures that may have more parameters. Everything else takes an object."""

NAMES = """
    __init__ __main__ attend autoregressive_wrapper belief_state_wrapper continuous continuous_autoencoder dpo
    discover_wrapper encoder_decoder entropy_based_tokenizer errors free_transformer full_bandwidth gpt_lejepa gpt_vae
    losses multi_input neo_mlp next_latent_wrapper nonautoregressive_wrapper notices ops plots recirculation
    speech_transformer up_wrapper x_transformers xm_latent_decoder xl_autoregressive_wrapper xval
"""
ROOT_MODULES = frozenset(NAMES.split())
"""Modules that users import by these names; everything else has a folder."""


@functools.cache
def forward() -> Trace:
    return trace_forward()


@pytest.mark.parametrize(
    ("figure", "most"), [("calls", CALLS), ("files", FILES), ("changes", CHANGES), ("depth", DEPTH)]
)
def test_one_forward_pass(figure: str, most: int) -> None:
    found = getattr(forward(), figure)
    assert (found if isinstance(found, int) else len(found)) <= most


def test_one_generated_token() -> None:
    assert calls_of_a_token() <= CALLS_OF_A_TOKEN


def test_no_class_is_too_long() -> None:
    assert [found for found in classes() if found[0] > LINES_OF_A_CLASS] == []


def test_only_public_signatures_are_long() -> None:
    long = [(count, where) for count, where in parameter_lists() if count > PARAMETERS]
    assert [found for found in long if found[1].split(": ")[1] not in LONG_SIGNATURES] == []


def test_listed_signatures_are_public() -> None:
    modules = [x_transformers, *(importlib.import_module(f"x_transformers.{name}") for name in ROOT_MODULES)]
    for name in LONG_SIGNATURES:
        owner, method = name.split(".")
        owners = [getattr(module, owner) for module in modules if hasattr(module, owner)]
        assert owners, f"no module that users import has {owner}"
        assert callable(getattr(owners[0], method))


def test_modules_in_the_root_are_those_that_users_import() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
