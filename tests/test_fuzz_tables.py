"""The tables of the fuzz tests name every public class and every public method of a model or an objective."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import fuzz
import fuzz_objectives  # noqa: F401
import fuzz_parts  # noqa: F401
import pytest
from test_house import ROOT_MODULES

import x_transformers
from x_transformers import DPO, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError
from x_transformers.options.checked import Checked
from x_transformers.options.configured import Configured

NO_CONSTRUCTOR = {
    "AttentionLayers": "that of Encoder and Decoder",
    "GivenAddend": "made by `Attend`",
    "ReluSquared": "without arguments",
    "ResidualDynamics": "one argument, a module",
}
MACHINERY = """
    adopt_config after_loading derived_buffers describe export_reference export_reference_state_dict from_config
    from_pretrained leave_meta load_state_dict named_modules push_to_hub reference_names register_derived
    save_pretrained translate_reference
"""
"""State dicts, folders and configurations, whose hostile forms are in the tests of loading and of model files."""
NO_CALL = {
    "a contract between parts, stack and model, which calls it itself": """
        AdvancesNorms.note_norms Attend.check_causality Attend.flash_attn Attend.of_parts Attend.run
        Attend.share_scores Attention.check_causality Attention.explain Attention.parts Attention.prepare
        Attention.run Attention.share_scores BranchFunction.begin_at BranchFunction.cache_streams
        BranchFunction.check_causality BranchFunction.explain BranchFunction.remember CallAdapter.layer_call
        CallAdapter.run_call DPO.train FeedForward.prepare FeedForward.run FullBandwidth.make_transforms
        HeadProjection.cache_streams HeadProjection.change_output HeadProjection.extend_keys
        HeadProjection.project_heads HeadProjection.remember LayerStack.attentions LayerStack.branches
        LayerStack.cache_streams LayerStack.may_show_scores LayerStack.order_of LayerStack.reaches
        LayerStack.rotations_of LayerStack.router_of LayerStack.kept_streams_of Recirculation.mix
        Recirculation.mix_coefficients Recirculation.recirculate SyntheticDataGenerator.forward
        SyntheticDataGenerator.init_ TPREncoder.readout TPREncoder.state TransformerWrapper.init_
        TransformerWrapper.logits_of XMLatentDecoder.init_latents
    """,
    "no argument, or those of PyTorch": """
        Attention.muon_parameters AttentionLayers.compile_blocks AttentionLayers.mix_streams_as_reference
        AttentionLayers.muon_parameters DPO.parameters FeedForward.muon_parameters Model.muon_parameters
        SyntheticDataGenerator.reset_ UniversalPretrainWrapper.forward
        UniversalPretrainWrapper.get_rand_sequences_from_buffer
    """,
    "arguments and checks of another method in the tables": """
        Attention.qk_clip_ AttentionLayers.attn_qk_clip_ AttentionLayers.explain AttentionLayers.static_cache
        AutoregressiveWrapper.stream ContinuousAutoregressiveWrapper.stream FreeTransformer.encode_to_latents
        Recirculation.learn_parameters SpeechTransformer.stream TPREncoder.fit XLAutoregressiveWrapper.stream
        XMLatentDecoder.generate_with_candidate_latents XTransformer.stream XValAutoregressiveWrapper.stream
        DiscoverDecoder.surgery
    """,
    "a function of tensors, which raises what PyTorch raises": """
        BinaryMapper.forward DeterministicLatentBottleneck.forward VariationalLatentBottleneck.forward sigreg_loss
    """,
}


def public_classes() -> Iterator[type]:
    """Yield the classes with checked constructors that scripts import from the root of the package."""
    for name in sorted(ROOT_MODULES - {"__init__"}):
        module = importlib.import_module(f"x_transformers.{name}")
        for each, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", None) == module.__name__ or name == "x_transformers"
            if own and inspect.isclass(value) and issubclass(value, Checked) and not each.startswith("_"):
                yield value


def methods(cls: type) -> Iterator[str]:
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        function: Any = getattr(found, "__func__", found)
        ours = inspect.isfunction(function) and function.__module__.startswith("x_transformers")
        if ours and not name.startswith("_") and name not in MACHINERY.split():
            yield function.__qualname__


def test_every_public_constructor_is_in_a_table() -> None:
    made = {make for make, _ in fuzz.CONSTRUCTORS.values()}
    missing = {cls.__name__ for cls in public_classes() if cls not in made}
    assert missing == set(NO_CONSTRUCTOR)


def test_every_public_name_is_in_a_table() -> None:
    # what reads files has tests of its own, and so has a dataclass of plain values
    others = {"AttentionLayers", "EarlyExit", "default_device", "load_pretrained"}
    assert set(x_transformers.__all__) - others <= {*fuzz.CONSTRUCTORS, *fuzz.CALLS}


def test_every_public_method_is_in_a_table() -> None:
    called = set()
    for call in fuzz.CALLS.values():
        function: Any = call.make()
        called.add(getattr(function, "__func__", function).__qualname__)
    found = {name for cls in public_classes() if issubclass(cls, Configured) for name in methods(cls)}
    exempt = {name for names in NO_CALL.values() for name in names.split()}
    assert found - called == exempt


def test_objects_that_a_configuration_does_not_name() -> None:
    """They would have no effect."""
    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers)
    with pytest.raises(ConfigError, match="names no object `labels`"):
        TransformerWrapper.from_config(model.config, labels=3)
    with pytest.raises(ConfigError, match=r"names no object `model\.to_logits`"):
        DPO.from_config(DPO(model).config, **{"model.to_logits": None})
