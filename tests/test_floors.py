"""A module imports from lower floors only, or from the `base` of its own folder. Siblings do not import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "x_transformers"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# From the ground up. A row is a floor, or a step inside of one; a name covers what lies under it, and the
# longest name that fits decides. What is named nowhere is a training objective.
HOUSE = (
    ("F0", ["options.suggestions"]),
    (
        "F0",
        ["errors", "ops", "modules.float32_buffers", "modules.hand_written", "modules.script_names", "modules.unwrap"],
    ),
    ("F0", ["options.docstrings", "options.values", "forward_pass.names", "notices"]),
    ("F0", ["options.checked", "forward_pass.arguments", "forward_pass.arrays", "forward_pass.changed_copies"]),
    ("F0", ["modules.whole_loading"]),
    ("F1", ["forward_pass.documents"]),
    ("F1", ["forward_pass.call"]),
    ("F1", ["masks.visibility"]),
    ("F1", ["masks.block_masks"]),
    ("F1", ["options.schema", "modules.state_dict", "modules.second_names", "modules.inference", "modules.borrowed"]),
    ("F1", ["options"]),
    ("F1", ["checkpoints.durable", "checkpoints.tensor_files"]),
    ("F1", ["folders.building", "folders.config_file", "folders.file_memory", "folders.hub"]),
    ("F1", ["folders.shards"]),
    ("F1", ["folders.writing"]),
    ("F1", ["folders.own"]),
    ("F1", ["folders"]),
    ("F2", ["cache.entries", "cache.row_slots", "modules", "losses"]),
    ("F2", ["cache.kv_cache"]),
    ("F2", ["cache"]),
    ("F2", ["routing.base", "routing.soft_topk"]),
    ("F2", ["routing"]),
    ("F2", ["routing.exchange"]),
    ("F2", ["forward_pass.intermediates"]),
    ("F2", ["masks.builder", "modules.branch_function", "modules.prepbn"]),
    ("F2", ["recurrences.base", "recurrences.cells"]),
    (
        "F2",
        ["recurrences.naive", "recurrences.carry", "recurrences.chunks", "recurrences.memory_rule", "recurrences.walk"],
    ),
    ("F2", ["recurrences"]),
    ("F2", ["recurrences.stabilized", "recurrences.partitions"]),
    ("F3", ["attention.qk.decay", "attention.qk.rotation", "attention.head_maps"]),
    ("F3", ["attention"]),
    ("F3", ["attention.qk.rotary", "attention.backends.flex"]),
    ("F3", ["attention.attend_inputs", "attention.heads", "attention.backends.choice", "attention.backends.on_demand"]),
    ("F4", ["attend"]),
    ("F4", ["attention.call_adapter", "attention.subsampling"]),
    ("F5", ["feedforward.softclamp"]),
    (
        "F5",
        [
            "attention.catalog",
            "feedforward.activations",
            "feedforward.glu",
            "feedforward.param_attention",
            "feedforward.rational",
        ],
    ),
    ("F5", ["attention.build"]),
    ("F5", ["attention.attention", "feedforward"]),
    ("F5", ["feedforward.experts", "feedforward.soft_experts", "feedforward.heavy"]),
    ("F5", ["feedforward.catalog"]),
    ("F5", ["mixers.base"]),
    ("F5", ["mixers.parts", "mixers.grid", "mixers.read_out", "mixers.costs"]),
    ("F5", ["mixers.learning_memory", "mixers.state_space", "mixers.token_table"]),
    ("F5", ["mixers"]),
    ("F5", ["mixers.catalog"]),
    ("F6", ["layers.kinds"]),
    ("F6", ["layers.residuals.base", "layers.execution_order", "layers.views"]),
    ("F6", ["layers"]),
    ("F6", ["layers.branch", "layers.wrappers"]),
    ("F6", ["layers.catalog", "layers.pass_state", "layers.compile_blocks"]),
    ("F6", ["layers.plan", "layers.token_layout"]),
    ("F6", ["layers.build", "layers.packing", "layers.tied_blocks"]),
    ("F6", ["layers.stack"]),
    (
        "F6",
        [
            "layers.branch_inputs",
            "layers.per_layer_inputs",
            "layers.explain",
            "layers.reference_names",
            "layers.experts",
        ],
    ),
    ("F6", ["layers.optional_inputs", "layers.batch_norms"]),
    ("F6", ["layers.edited_cache"]),
    ("F6", ["layers.runner"]),
    ("F6", ["layers.block_steps"]),
    ("F6", ["layers.routed_blocks"]),
    ("F6", ["layers.blockwise"]),
    ("F6", ["layers.layers"]),
    ("F6", ["layers.named_stacks"]),
    ("F6", ["layers.attention_pool"]),
    ("F7", ["models.embeddings", "models.memory_layout", "models.recurrence"]),
    ("F7", ["models.inputs", "models.heads", "models.options"]),
    ("F7", ["models.options.catalog"]),
    ("F7", ["models.options.reading"]),
    ("F7", ["models.internal_sequence", "models.requested_outputs"]),
    ("F7", ["models.repeated", "models.exits"]),
    ("F7", ["models.base"]),
    ("F7", ["models"]),
    ("F7", ["models.transformer", "models.vision"]),
    ("F7", ["models.chunked_loss", "models.ensemble", "models.grow_param_tokens", "models.to_rmsnorm"]),
    ("F8", ["decoding"]),
    ("F8", ["decoding.options"]),
    ("F8", ["decoding.caches"]),
    ("F8", ["decoding.step"]),
    ("F8", ["decoding.compiled", "decoding.recorded"]),
    ("F8", ["decoding.loop"]),
    ("F8", ["decoding.beam", "decoding.speculative"]),
    ("F8", ["decoding.generation"]),
    ("F9", ["test_time.episodic", "test_time.inner_losses", "test_time.row_weights", "test_time.steps"]),
    ("F9", ["test_time.places"]),
    ("F9", ["test_time"]),
    ("F9", ["*"]),
    ("F9", ["encoder_decoder", "gpt_lejepa", "gpt_vae", "speech_transformer", "up_wrapper", "xm_latent_decoder"]),
    ("F9", ["training.expert_parallel"]),
    ("F10", ["checkpoints.plain_data", "checkpoints.random_states"]),
    ("F10", ["checkpoints.folder", "checkpoints.optimizer_checks", "checkpoints.parts"]),
    ("F10", ["checkpoints.files", "checkpoints.optimizer_states", "checkpoints.old_layout"]),
    ("F10", ["checkpoints"]),
    ("F10", ["pretrained.layouts"]),
    ("F10", ["pretrained.base"]),
    ("F10", ["pretrained.rotary", "pretrained.alibi", "pretrained.experts"]),
    ("F10", ["pretrained.gated_decoder", "pretrained.layer_norm_decoder", "pretrained.recurrent"]),
    ("F10", ["pretrained.encoder", "pretrained.encoder_decoder", "pretrained.towers"]),
    ("F10", ["pretrained.entries", "pretrained.described"]),
    ("F10", ["pretrained.families"]),
    ("F10", ["pretrained.catalog"]),
    ("F10", ["pretrained.outlines", "pretrained.filling", "pretrained.starts", "pretrained.reference"]),
    ("F10", ["pretrained.overrides", "pretrained.writing"]),
    ("F10", ["pretrained.loading"]),
    ("F11", ["training.texts", "training.tokenizer", "training.presets", "training.speed", "training.gradients"]),
    ("F11", ["training.curve", "training.records", "training.token_files", "training.settings"]),
    ("F11", ["training.batches", "training.recipe", "training.trained"]),
    ("F11", ["training.run", "training.small_runs"]),
    ("F11", ["training.train", "training.generate", "training.explain", "training.convert", "training.bench"]),
    ("roof", ["x_transformers", "", "__main__"]),
)
STEP = {name: step for step, (_, names) in enumerate(HOUSE) for name in names}


def step_of(module: str) -> int:
    parts = module.split(".")
    covering = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((STEP[name] for name in covering if name in STEP), STEP["*"])


def imports(path: Path, package: list[str], modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and module, relative to the package, of each import from the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = [PACKAGE, *package][: len(package) + 2 - node.level] if node.level else []
            source = [*start, *(node.module.split(".") if node.module else [])]
            found = [[*source, alias.name] for alias in node.names]
        else:
            continue
        for head, *rest in found:
            if head == PACKAGE:  # the last name may be a module or something that a module defines
                name = ".".join(rest)
                yield node.lineno, name if name in modules else ".".join(rest[:-1])


def label(module: str) -> str:
    return f"{module or PACKAGE} ({HOUSE[step_of(module)][0]})"


def violations(root: Path) -> list[str]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    faults = []
    for module, path in modules.items():
        package = list(path.relative_to(root).parent.parts)
        bases = {".".join([*package[:depth], "base"]) for depth in range(1, len(package) + 1)} - {module}
        for line, target in sorted(set(imports(path, package, set(modules)))):
            inside = path.name == "__init__.py" and target.startswith(f"{module}." if module else "")
            rise = step_of(target) - step_of(module)
            if rise > 0 or (rise == 0 and not inside and target not in bases):
                where = f"{path.relative_to(root.parent).as_posix()}:{line}"
                faults.append(f"{where}: {label(module)} imports {label(target)}")
    return faults


def test_imports_go_down() -> None:
    faults = violations(ROOT)
    assert not faults, "\n".join(["imports must go down:", *faults])


def test_upward_imports_are_found(tmp_path: Path) -> None:
    root = tmp_path / PACKAGE
    files = {
        "ops.py": "import torch\nfrom x_transformers import attend",
        "attention/base.py": "from x_transformers.ops import l2norm",
        "attention/latent.py": "from .base import Mask\nfrom .projections import Plain",
        "attention/projections.py": "def f():\n    from x_transformers.attention.attention import Attention",
        "attention/scores/__init__.py": "from .alibi import Alibi",
        "attention/scores/alibi.py": "from ..base import ScoreMod\nfrom ...modules.norms import LayerNorm",
        "attention/attention.py": "import x_transformers.attend",
        "attend.py": "from x_transformers import Decoder",
        "modules/norms.py": "",
        "dpo.py": "from x_transformers.checkpoints.reading import read",
        "checkpoints/reading.py": "",
        "__init__.py": "from x_transformers.x_transformers import Decoder",
        "x_transformers.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert violations(root) == [
        "x_transformers/attend.py:1: attend (F4) imports x_transformers (roof)",
        "x_transformers/attention/latent.py:2: attention.latent (F3) imports attention.projections (F3)",
        "x_transformers/attention/projections.py:2: attention.projections (F3) imports attention.attention (F5)",
        "x_transformers/dpo.py:1: dpo (F9) imports checkpoints.reading (F10)",
        "x_transformers/ops.py:2: ops (F0) imports attend (F4)",
    ]
