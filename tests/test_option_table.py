"""The table of options is generated from the catalog and the recorded costs."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.models.options.catalog import FEATURES as MODEL_FEATURES

ROOT = Path(__file__).resolve().parents[1]
OF_MIXERS = {"mixer", "layer_period"}
NAMES = [
    feature.name
    for feature in (*STACK_FEATURES, *MODEL_FEATURES)
    if feature.group != "mixer" and feature.name not in OF_MIXERS
]
"""Features of the table; mixers have their own, in `docs/token-mixers.md`."""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the folder of benchmarks, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return {
        name: importlib.import_module(f"benchmarks.{name}")
        for name in ("choices", "configurations", "options", "table")
    }


def test_the_table_is_current(benchmarks: dict[str, ModuleType]) -> None:
    table = benchmarks["table"]
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.written(page) == page, "run `python -m benchmarks.table --write`"


def test_tables_of_choices_are_current(benchmarks: dict[str, ModuleType]) -> None:
    choices = benchmarks["choices"]
    page = choices.PAGE.read_text(encoding="utf-8")
    assert choices.written(page) == page, "run `python -m benchmarks.table --write`"
    for task, (_, changes, *_) in choices.TASKS.items():
        measured = choices.recorded()[task]["bits"]
        assert list(measured) == [change.words for change in changes], "run `python -m benchmarks.choices`"
        assert {change.feature for change in changes} <= {None, *NAMES}


@pytest.mark.parametrize("task", ["language model", "encoder", "vision transformer"])
def test_choices_train(task: str, benchmarks: dict[str, ModuleType]) -> None:
    train, changes, *_ = benchmarks["choices"].TASKS[task]
    assert 0 < train(changes[-1], 0, 2) < 12


def test_every_feature_has_a_cost(benchmarks: dict[str, ModuleType]) -> None:
    measured = [name for each in benchmarks["options"].recorded() for name in each["costs"]]
    assert sorted(measured) == sorted(NAMES), "run `python -m benchmarks.options FEATURE`"
    assert all(0 < cost < 2 for each in benchmarks["options"].recorded() for cost in each["costs"].values())


@pytest.mark.parametrize("name", NAMES)
def test_each_row(name: str, benchmarks: dict[str, ModuleType]) -> None:
    """It names a keyword, and what is measured has the feature while the other model lacks its keywords."""
    table, configurations = benchmarks["table"], benchmarks["configurations"]
    case = configurations.configuration(name)
    keywords = table.keywords(case)
    assert keywords
    assert next(iter(keywords)) in case.having
    assert case.having != case.lacking
    assert {key for key in case.lacking if configurations.owns(case.feature, key)} <= set(
        configurations.WITHOUT.get(name, ())
    )
    assert case.feature.summary in table.row(name, 0.5)


def test_custom_configurations_name_features(benchmarks: dict[str, ModuleType]) -> None:
    configurations = benchmarks["configurations"]
    assert {*configurations.AT_SIZE, *configurations.WITHOUT, *configurations.NOT_CAUSAL} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "keywords", "fused"),
    [
        ("alibi", ["alibi_pos_bias"], "Flex; blocks on a CPU"),
        ("learned_sink", ["attn_head_learned_sink"], "Flex; blocks on a CPU"),
        ("sigmoid", ["attn_sigmoid"], "no"),
        ("inverted_attention", ["cross_attn_inverted_attention"], "SDPA in part"),
        ("grouped_heads", ["attn_kv_heads", "attn_one_kv_head"], "SDPA"),
        ("latent", ["attn_use_latent_q", "attn_use_latent_kv"], "SDPA"),
        ("glu", ["ff_glu"], "SDPA"),
        ("recurrent_memory", ["max_mem_len"], "SDPA"),
        (
            "absolute_positions",
            ["use_abs_pos_emb", "scaled_sinu_pos_emb", "abs_pos_emb_scale", "abs_pos_emb_offset"],
            "SDPA",
        ),
    ],
)
def test_rendered_rows(name: str, keywords: list[str], fused: str, benchmarks: dict[str, ModuleType]) -> None:
    table, case = benchmarks["table"], benchmarks["configurations"].configuration(name)
    assert list(table.keywords(case)) == keywords
    assert table.fused(case) == fused


def test_measurements_merge(benchmarks: dict[str, ModuleType]) -> None:
    merge = benchmarks["options"].merge
    one = merge([], {"alibi": 0.9, "glu": 0.8}, {"processor": "A"})
    assert one == [{"machine": {"processor": "A"}, "costs": {"alibi": 0.9, "glu": 0.8}}]
    again = merge(one, {"glu": 0.7}, {"processor": "A"})
    assert again == [{"machine": {"processor": "A"}, "costs": {"alibi": 0.9, "glu": 0.7}}]
    elsewhere = merge(one, {"glu": 0.6}, {"processor": "B"})
    assert [each["costs"] for each in elsewhere] == [{"alibi": 0.9}, {"glu": 0.6}]
    one[0]["costs"]["gone"] = 0.5
    assert merge(one, {"alibi": 1.0, "glu": 1.0}, {"processor": "B"}) == [
        {"machine": {"processor": "B"}, "costs": {"alibi": 1.0, "glu": 1.0}}
    ]


def test_training_steps_run(benchmarks: dict[str, ModuleType]) -> None:
    """The special ones: a context, a condition, memories, an encoder."""
    configurations, options = benchmarks["configurations"], benchmarks["options"]
    for name in ("context", "condition", "recurrent_memory", "inverted_attention"):
        case = configurations.configuration(name)
        options.step({**case.having, "depth": 1}, case.causal)()
