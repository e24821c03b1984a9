"""Break the library in one place at a time, and check that a test notices.

    python tests/mutants.py [--list] [--trust] [--jobs N] [WORDS ...]

A mutation is a regular expression and what it is replaced by; each place of the package where it matches is a mutant of
its own. Each one is written into a temporary copy of the checkout, in which the tests run that should notice it. With
words, only the mutations whose name contains one of them run. The exit code is 1 if a mutant survives, if a mutation
matches nowhere, or if the tests fail without any mutation.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "x_transformers"
TIMEOUT = 600
"""Seconds that the tests of one mutant may take. One that never ends is noticed."""

RANDOM = "properties/test_randomness.py"
FEW = "plain or rotary-1 or rotary-4 or alibi-1 or window-1 or shift_tokens-1 or memory_tokens-1 or heads"
"""Cases of a property that are enough to notice what concerns every model."""
CAUSAL = f"properties/test_causality.py -k '{FEW} or window_ends'"
PADDED = f"properties/test_padding.py -k '{FEW} or without_visible'"
DECODING = f"properties/test_cached_decoding.py -k '{FEW} or unused'"
WINDOWS = "properties/test_windows.py -k 'not every_feature and not compile and not graphs and not ragged'"
CALLS = (
    "test_caller_inputs.py test_fuzz.py properties/test_inputs.py test_fuzz_catalog.py "
    "-k 'not constructors and not encoder and not options'"
)
AHEAD = "properties/test_windows_of_encoders.py -k 'windows_end or window0-keywords0'"
BACKENDS = f"properties/test_backends.py -k '{FEW} or softmax or triangle'"

TAUGHT = "test_test_time.py -k 'every_row_by_hand'"
STEPS = "test_time/steps.py"
EXPERTS, AUX = "test_experts.py", "properties/test_aux_losses.py"
LATENT, CLIP = "test_latent.py test_latent_families.py", "test_caller_inputs.py -k clip"
DIVIDED = "test_divided_experts.py -k two"
SWITCH, POWER = "test_switch_head.py", "test_power_softmax.py"
GATES = "test_recurrences.py test_mixers.py -k 'gates or weighted or rows_are_read'"

CONVOLUTIONS = (
    "test_long_convolutions.py test_mixers.py -k '(h3 or lmu or hyena) and (rows_are or pieces) or filters or equal'"
)
GROUPS = "test_grouped_attention.py"
CHEAPER, BATCH = "test_norm_conversions.py", "test_prepbn.py -k 'not run and not learns'"


@dataclass(frozen=True)
class Mutation:
    """One way to break the library.

    Attributes:
        name: what is broken.
        pattern: regular expression; every match is a mutant.
        becomes: the replacement, with groups as in `re.sub`.
        tests: arguments of pytest, relative to the folder of tests.
        files: which modules of the package are searched, as a glob.
    """

    name: str
    pattern: str
    becomes: str
    tests: str
    files: str = "**/*.py"


MUTATIONS = (
    # norms of batches, and conversions of norms
    Mutation(
        "norms: the feature that is left out", r"x\.shape\[-1\] \+ 1\)", "x.shape[-1])", CHEAPER, "modules/norms.py"
    ),
    Mutation("norms: gains of readers", r"old\.double\(\) \* readers\[name\]\.double\(\)", "old.double()", CHEAPER),
    Mutation("norms: the scale of a tied head", r"\.detach\(\) \* head\.scale", ".detach()", CHEAPER),
    Mutation(
        "norms: the share of LayerNorm", r"1 - self\.steps_done / self\.steps", "self.steps_done / self.steps", BATCH
    ),
    Mutation("norms: padding of a sublayer", r"x, layer\.call\.token_mask\)", "x, None)", BATCH, "modules/prepbn.py"),
    Mutation("norms: padding of the output", r"stream, state\.call\.token_mask\)", "stream, None)", BATCH),
    Mutation("norms: the variance of the batch", r"\(count - 1\)\.clamp", "count.clamp", BATCH, "modules/prepbn.py"),
    Mutation("norms: memories by themselves", r"norm\(memory, statistics=seen\)", "norm(memory)", BATCH),
    Mutation("norms: one of several passes", r"joined\(\[\*earlier, \*seen\]\)", "seen[-1]", BATCH),
    # calls: names, models that see the future, sequences without targets, names of wrapped models
    Mutation(
        "losses of models that see the future", r"if sees and _is_ours", "if not sees and _is_ours", "test_next_item.py"
    ),
    Mutation("a user's mask is not the stack's", r"(if sees and) _is_ours\(net\)", r"\1 True", "test_next_item.py"),
    Mutation("a single item is enough", r"if x\.shape\[1\] < least:", "if x.shape[1] < 1:", "test_next_item.py"),
    Mutation("names that an inner method takes", r"names \| \(further - ", "names - (further - ", "test_call_names.py"),
    Mutation("names of wrappers stay", r'outer \+= f"\{name\}\."', "break", "test_wrapped_names.py"),
    Mutation("the name of the model in a wrapper", r"plain = missing \+ ", 'plain = "" + ', "test_wrapped_names.py"),
    # experts
    Mutation(
        "the bias changes weights",
        r"weights = scores\.gather",
        "weights = (scores + (self.score_bias if self.balances else 0)).gather",
        EXPERTS,
    ),
    Mutation("loads are not centered", r"bias -= bias\.mean\(\)", "pass", EXPERTS),
    Mutation(
        "biases move away from equal loads", r"\(load\.mean\(\) - load\)\.sign", "(load - load.mean()).sign", EXPERTS
    ),
    Mutation(
        "dead tokens count in loads",
        r"return t\.sum\(dim=\(0, 1\)\) / max",
        "return t.sum(dim=1).mean(0) / max",
        EXPERTS,
    ),
    Mutation("padding counts in losses", r"kept = t\.masked_fill\(~live\[.*\], 0\.0\)", "kept = t", AUX),
    Mutation("a group is its best expert only", r"topk\(2, dim=-1\)", "topk(1, dim=-1)", EXPERTS),
    Mutation("losses are added over layers", r"(loss\.weight for loss in losses\]\))\.mean\(\)", r"\1.sum()", AUX),
    Mutation("losses in evaluation", r"if not \(model\.training and ", "if not (", AUX),
    Mutation("dropped experts although too few are left", r"dropped & \(left >= topk\)", "dropped", EXPERTS),
    Mutation("biases of all experts are added", r"fn\.down\.bias\.detach\(\) / topk", "fn.down.bias.detach()", EXPERTS),
    # divided experts; each runs two processes
    Mutation("gradients of divided experts are sums", r"return gradient / self\.size", "return gradient", DIVIDED),
    Mutation(
        "rows return in another order", r"out, here\.inverse, here\.order", "out, here.order, here.inverse", DIVIDED
    ),
    Mutation("replicas of experts are not averaged", r"own /= mesh\.size\(0\)", "own /= 1", DIVIDED),
    Mutation("loads of the balance loss are sums", r"return whole / dist\.get_world_size\(\)", "return whole", DIVIDED),
    Mutation(
        "the command does not balance", r"if self\.balances:\n( +)self\.model", r"if False:\n\1self.model", DIVIDED
    ),
    Mutation("heads choose the matrices of the first", r"\+ experts \* torch\.arange", "+ 0 * torch.arange", SWITCH),
    Mutation("outputs choose as the memory does", r"\[:, columns - xq\.shape\[1\] :\]", "[:, : xq.shape[1]]", SWITCH),
    Mutation("values choose as outputs do", r"self\.values\(xv\.flatten", "self.values(xq.flatten", SWITCH),
    Mutation("matrices that were not chosen", r"torch\.zeros_like\(routing\.logits\)", "routing.logits", SWITCH),
    Mutation("losses are added over heads", r"(entr\(mean\)\.sum\(dim=-1\))\.mean\(\)", r"\1.sum()", SWITCH),
    Mutation("powers of hidden keys", r"masked_fill\(~mask, 0\.0\)", "clone()", POWER, "attention/weights/power.py"),
    Mutation("a small number is not scaled", r"EPSILON / largest.*", "EPSILON)", POWER),
    Mutation("one share of 1 too few", r"left - 1 <= \(below", "left - 2 <= (below", "test_soft_topk.py"),
    # latents and clamped gates
    Mutation(
        "latents of keys have no norm", r"latent if self\.norm is None else self\.norm\(latent\)", "latent", LATENT
    ),
    Mutation("latents of queries have no norm", r"latent if self\.latent_q_norm is None else .*", "latent", LATENT),
    Mutation(
        "the shared part of latent keys is last", r"torch\.cat\(\(sub, k\), dim=-1\)", "torch.cat((k, sub), -1)", LATENT
    ),
    Mutation(
        "a clip of latents halves the factor of what is shared",
        r"\(factors\[:, None\]\.expand",
        "(rest[:, None].expand",
        CLIP,
    ),
    Mutation("latents of files keep their order of features", r"rolled\(theirs, count\)", "rolled(theirs, 0)", LATENT),
    Mutation("latents of files have one factor of scores", r"(\+ 1\.0\)) \*\* 2 if scaling", r"\1 if scaling", LATENT),
    Mutation("clamped gates have no shift of values", r"(up\.clamp\(-self\.limit, self\.limit\)) \+ 1", r"\1", LATENT),
    Mutation(
        "clamped gates have a lower bound",
        r"gate\.clamp\(max=self\.limit\)",
        "gate.clamp(-self.limit, self.limit)",
        LATENT,
    ),
    # dropouts: every one of them is deleted
    Mutation("dropout deleted", r"F\.dropout\(([\w.]+), [^()]*\)", r"\1", RANDOM),
    Mutation("dropout of fused attention deleted", r"dropout_p=[\w.]+", "dropout_p=0.0", RANDOM),
    Mutation("dropout of weights not requested", r"self\.dropout if self\.training else 0\.0", "0.0", RANDOM),
    Mutation("dropout of weights in evaluation", r"(self\.dropout) if self\.training else 0\.0", r"\1", RANDOM),
    Mutation("layer dropout deleted", r"if self\.dropout and self\.training:", "if False:", RANDOM),
    Mutation("layer dropout keeps what it should skip", r"torch\.rand\((.*)\) >= p\b", r"torch.rand(\1) < p", RANDOM),
    Mutation("context dropout deleted", r"\w+\.context_dropout and \w+\.training:", "False:", RANDOM),
    Mutation(
        "dropout of a translation's source deleted",
        r"if self\.training and self\.cross_attn_tokens_dropout > 0:",
        "if False:",
        RANDOM,
    ),
    Mutation("embedding dropout skipped", r"if self\.emb_dropout and .*:", "if False:", RANDOM),
    Mutation("Gumbel noise deleted", r"logits - torch\.empty_like\(logits\)\.exponential_\(\).*", "logits", RANDOM),
    Mutation("the number of passes is not drawn", r"int\(torch\.randint\(1, (\w+) \+ 1, \(\)\)\)", r"\1", RANDOM),
    # masks
    Mutation(
        "causality sees one token ahead",
        r"\(of_k\[columns\] <= of_q\[rows\]\.unsqueeze\(-1\)\)",
        "(of_k[columns] <= of_q[rows].unsqueeze(-1) + 1)",
        CAUSAL,
    ),
    Mutation(
        "the triangle sees one token ahead",
        r"\.tril\(j - i\)",
        ".tril(j - i + 1)",
        f"properties/test_causality.py {BACKENDS}",
        "attention/backends/*.py",
    ),
    Mutation(
        "a window is one token short",
        r"<= self\.window\b",
        "< self.window",
        CAUSAL,
    ),
    Mutation(
        "a window ends one token early",
        r"distance >= -self\.ahead",
        "distance > -self.ahead",
        AHEAD,
        "masks/*.py",
    ),
    Mutation(
        "blocks of keys end before the window",
        r"self\.diagonal \+ self\.ahead, 1\)",
        "self.diagonal + self.ahead - 1, 1)",
        AHEAD,
        "masks/*.py",
    ),
    Mutation(
        "a norm before the first sublayer",
        r" and \(index > 0 or where\.first\)",
        "",
        "test_pretrained_keywords.py -k 'first_sublayer'",
        "layers/build.py",
    ),
    Mutation(
        "values without a bound",
        r"q, k, raw = projections\.clipped\(q, k, raw\)",
        "q, k = projections.clipped(q, k)",
        "test_pretrained_keywords.py -k 'bounded'",
        "attention/heads.py",
    ),
    Mutation(
        "the page that two pieces of files share",
        r"over = 0 if end == size else",
        "over = 0 if end else",
        "test_mapped_weights.py",
        "folders/*.py",
    ),
    Mutation(
        "padding is seen",
        r"token_mask = self\.token_mask\[:, None, None, columns\]",
        r"token_mask = torch.ones_like(self.token_mask[:, None, None, columns])",
        PADDED,
    ),
    Mutation(
        "documents see each other",
        r"\(of_k\[columns\] == of_q\[rows\]\.unsqueeze\(-1\)\)",
        "(of_k[columns] <= of_q[rows].unsqueeze(-1))",
        "test_packed.py properties/test_documents.py",
    ),
    Mutation(
        "rows that see nothing are not zero",
        r"return weights if fully_masked is None else weights\.masked_fill\(fully_masked, 0\.0\)",
        "return weights",
        PADDED,
    ),
    Mutation(
        "masked rows leave attention",
        r"(\w+)\.masked_fill\(~call\.row_mask\.unsqueeze\(-1\), 0\.0\)",
        r"\1",
        "properties/test_padding.py -k hidden_tokens_is",
    ),
    # caches
    Mutation(
        "a cached slot is one too far",
        r"torch\.arange\(self\.length - count, self\.length,",
        "torch.arange(self.length - count + 1, self.length + 1,",
        DECODING,
        "cache/*.py",
    ),
    Mutation(
        "a window's cache keeps one token less",
        r"self\._newest\(past, self\.reach\)",
        "self._newest(past, self.reach - 1)",
        WINDOWS,
        "cache/*.py",
    ),
    Mutation(
        "a ring goes round one place early",
        r"\.remainder\(self\.room\)\)$",
        ".remainder(self.room - 1))",
        WINDOWS,
        "cache/*.py",
    ),
    Mutation(
        "beams keep the rows they had",
        r"t\.index_select\(0, rows\)",
        "t",
        "test_beam_search.py test_decoding.py",
        "cache/*.py",
    ),
    Mutation(
        "a rollback keeps the streams",
        r"stream\[\.\.\., : stream\.shape\[-2\] - count, :\]",
        "stream",
        "test_speculative.py",
        "cache/*.py",
    ),
    Mutation(
        "the static cache does not count",
        r"(\w+)\.filled = self\.filled \+ count",
        r"\1.filled = self.filled + 0",
        "test_static_cache.py",
        "cache/*.py",
    ),
    Mutation(
        "a shift forgets the cached tokens",
        r'layer\.states\.get\("token_shift"\)',
        "None",
        DECODING,
        "layers/branches/*.py",
    ),
    # early exits
    Mutation("an exit is one block late", r"step\.block \+ 1 in exits", "step.block in exits", "test_exits.py"),
    Mutation(
        "exits have no norm of their own",
        r"norm = stack\.final_norm if norm is None else norm",
        "norm = stack.final_norm",
        "test_exits.py",
    ),
    Mutation("exits do not take turns", r"\(i \+ \(step or 0\)\) % self\.every", "i % self.every", "test_exits.py"),
    Mutation(
        "the end of the exits is scaled",
        r"(weight \* scale for weight in before\), last)",
        r"\1 * scale",
        "test_exits.py",
    ),
    Mutation("all blocks guess instead of an exit", r"first_blocks\(self, exit_layer\)", "self", "test_exits.py"),
    # memories
    Mutation(
        "memories are shifted up",
        r"\*own\[shift:\], \*own\[:shift\]",
        "*own[-shift:], *own[:-shift]",
        "properties/test_memories.py",
    ),
    Mutation(
        "the oldest memory is kept",
        r"whole\[\.\.\., max\(whole\.shape\[-2\] - most, 0\) :, :\]",
        "whole[..., :most, :]",
        "properties/test_memories.py",
    ),
    # positions
    Mutation(
        "keys are rotated one position further",
        r"self\._table\(keys\.pos\)",
        "self._table(keys.pos + 1)",
        "test_query_key.py properties/test_positions.py -k 'rotat or rotary or xpos or positions'",
        "attention/qk/*.py",
    ),
    Mutation(
        "rotation turns the other way for queries",
        r"self\._rotate_heads\(q, tables\[0\]\)",
        "self._rotate_heads(q, tables[0], sign=-1)",
        "properties/test_positions.py -k rotary",
        "attention/qk/*.py",
    ),
    Mutation(
        "interpolation of positions is ignored",
        r" / self\.interpolation_factor",
        "",
        "properties/test_positions.py -k by_formula",
        "attention/qk/*.py",
    ),
    Mutation(
        "xPos decays the wrong way",
        r"return distance\.unsqueeze\(-1\) \* self\.rates",
        "return -distance.unsqueeze(-1) * self.rates",
        "properties/test_decay.py",
        "attention/qk/*.py",
    ),
    Mutation(
        "ALiBi is half as steep",
        r"-distance\.abs\(\)\.unsqueeze\(-3\)",
        "-0.5 * distance.abs().unsqueeze(-3)",
        "properties/test_positions.py -k by_formula",
        "attention/scores/*.py",
    ),
    # heads
    Mutation(
        "shared heads are tiled",
        r"t\.repeat_interleave\(heads // g, dim=-3\)",
        "t.repeat(1, heads // g, 1, 1)",
        f"properties/test_kv_heads.py {BACKENDS}",
        "ops.py",
    ),
    Mutation(
        "the first heads rotate instead of the last",
        r"torch\.cat\(\(t\[:, :rest\], rotate\(t\[:, rest:\], table, sign\)\), dim=1\)",
        "torch.cat((rotate(t[:, :-rest], table, sign), t[:, -rest:]), dim=1)",
        "properties/test_positions.py -k by_formula",
        "attention/qk/*.py",
    ),
    Mutation(
        "heads are mixed by the transposed matrix",
        r'"oh,bhij->boij"',
        '"ho,bhij->boij"',
        "test_scores_and_weights.py properties/test_heads.py",
        "ops.py",
    ),
    # scales and precision
    Mutation(
        "scores are scaled by the width of a head",
        r"(dim_head|q\.shape\[-1\])\s*\*\*\s*-0\.5",
        r"\1 ** -1.0",
        "test_standalone_attention.py test_scores_and_weights.py properties/test_scales.py",
    ),
    Mutation(
        "the scale of normalized queries is ignored",
        r"self\.scale = None if dim_scale else scale",
        "self.scale = None if dim_scale else 10.0",
        "test_query_key.py properties/test_scales.py",
        "attention/qk/*.py",
    ),
    Mutation(
        "autocast narrows what was widened",
        r"torch\.autocast\(([\w.]+\.device\.type), enabled=False\)",
        r"torch.autocast(\1, enabled=torch.is_autocast_enabled(\1))",
        "properties/test_precision.py -k autocast",
        "**/att*.py",
    ),
    Mutation(
        "a constant scale of the stream is ignored",
        r"kept \* self\.constant",
        "kept",
        "test_residuals.py properties/test_scales.py",
        "layers/residuals/*.py",
    ),
    Mutation(
        "both streams of ResiDual get the whole output",
        r"y \+ self\.scale \* out",
        "y + out",
        "test_residuals.py properties/test_scales.py",
        "layers/residuals/*.py",
    ),
    Mutation(
        "a layer's scale is used without its offset",
        r"self\.gamma \+ 1 if self\.unit_offset else self\.gamma\)$",
        "self.gamma)",
        "test_residuals.py properties/test_scales.py",
        "layers/branches/*.py",
    ),
    # weights of keys and biases of maps
    Mutation(
        "a softmax is stretched in the wrong direction",
        r"new_full\(\(\), self\.gamma\)",
        "new_full((), -self.gamma)",
        "test_scores_and_weights.py -k Clipped",
        "attention/weights/*.py",
    ),
    Mutation(
        "QK clip leaves biases as they are",
        r"linear\.bias\.mul_\(rows\.to\(linear\.bias\)\)",
        "pass",
        "test_caller_inputs.py -k clip",
        "attention/clip.py",
    ),
    Mutation(
        "packed maps have no biases",
        r"torch\.cat\(biases\) if biases else None",
        "None",
        "test_inference_views.py -k packed",
        "attention/projections.py",
    ),
    # gates
    Mutation(
        "a head's gate is reversed",
        r"split_heads\(self\.gate\(seen\.x\), out\.shape\[-3\]\)\.sigmoid\(\)",
        "split_heads(-self.gate(seen.x), out.shape[-3]).sigmoid()",
        "test_values.py",
        "attention/values/*.py",
    ),
    Mutation(
        "SwiGLU gates are sigmoids",
        r"(torch\.nn\.functional|F)\.silu\(logits\) if self\.swiglu else logits\.sigmoid\(\)",
        "logits.sigmoid()",
        "test_values.py properties/test_scales.py",
        "attention/values/*.py",
    ),
    Mutation(
        "the GRU's input and state change places",
        r"self\.gru\(out\.reshape\(-1, width\), kept\.reshape\(-1, width\)\)",
        "self.gru(kept.reshape(-1, width), out.reshape(-1, width))",
        "test_residuals.py properties/test_scales.py",
        "layers/residuals/*.py",
    ),
    Mutation(
        "the activation is on the other half of a GLU",
        r"up \* activation\(gate\)",
        "gate * activation(up)",
        "test_units.py test_sequence.py test_goldens.py properties/test_scales.py",
        "feedforward/*.py",
    ),
    # replaced parts
    Mutation(
        "an assignment under a second name registers another child",
        r"isinstance\(getattr\(type\(self\), name, None\), property\)",
        "False",
        "test_dropin_names.py -k replaced_maps",
        "modules/second_names.py",
    ),
    Mutation(
        "a wrapped map is prepared without its wrapper",
        r"(Map\(module\.weight, module\.bias\)) if is_plain\(module, nn\.Linear\) else None",
        r"\1 if module is not None else None",
        "test_dropin_names.py -k hooks_on_them",
        "modules/inference.py",
    ),
    Mutation(
        "the tied head keeps the table that it was built with",
        r"self\._model: tuple\[Any\] = \(model,\)",
        "self._model = (type('Kept', (), {'token_emb': model.token_emb}),)",
        "test_dropin_names.py -k replaced_embeddings",
        "models/heads.py",
    ),
    Mutation(
        "a replaced attention loses what it leaves for later layers",
        r"return BranchOutput\(out, left\.record, left\.carry\)",
        "return BranchOutput(out, left.record, layer.carry)",
        "test_dropin_names.py -k hands_on",
        "layers/replaced_function.py",
    ),
    Mutation(
        "the hybrid module is the one it was built with",
        r"(return SequenceRunner)\(self\.module,",
        r"\1(self.__dict__.setdefault('_first', self.module),",
        "properties/test_replaced_parts.py -k 'hybrid'",
        "attention/values/hybrid.py",
    ),
    Mutation(
        "a check of arguments deleted",
        r"if [^\n]+:(\n +raise InputError)",
        r"if False:\1",
        CALLS,
        "forward_pass/arguments.py",
    ),
    Mutation(
        "a check of optional arguments deleted",
        r"if [^\n]+:(\n +raise (?:Input|Shape)Error)",
        r"if False:\1",
        CALLS,
        "layers/optional_inputs.py",
    ),
    Mutation(
        "a check of shapes deleted",
        r"if [^\n]+:(\n +raise ShapeError)",
        r"if False:\1",
        CALLS,
        "attention/validation.py",
    ),
    Mutation(
        "a check of the states of optimizers deleted",
        r"if [^\n]+:(\n +raise CheckpointError)",
        r"if False:\1",
        "test_optimizer_options.py test_checkpoints.py",
        "checkpoints/optimizer_*.py",
    ),
    # test-time training
    Mutation("test-time steps go up", r"weights - lr \* gradient", "weights + lr * gradient", TAUGHT, STEPS),
    Mutation("test-time decay grows", r"- lr \* self\.wd \* weights", "+ lr * self.wd * weights", TAUGHT, STEPS),
    Mutation(
        "test-time rows share their dropout",
        r'randomness="different"',
        'randomness="same"',
        "test_test_time.py -k dropout_inside",
    ),
    Mutation(
        "test-time steps read the rest of a prompt into the memory",
        r"if last - self\.first < size:",
        "if False:",
        "test_test_time.py -k prompts_of_any_length",
    ),
    Mutation(
        "test-time weights stay",
        r"(?:reader\.)?adaptation\.end\(\)",
        "pass",
        "test_test_time.py -k 'own_weights or error or hooks'",
        "xl_*.py",
    ),
    Mutation(
        "test-time targets are the features before",
        r"roll\(-1, dims=1\)",
        "roll(1, dims=1)",
        "test_test_time.py -k next_features",
    ),
    # keywords of pretrained models
    Mutation(
        "positions begin at row 0",
        r"self\.emb\(pos \+ self\.first_row if self\.first_row else pos\)",
        "self.emb(pos)",
        "test_pretrained_keywords.py",
    ),
    Mutation("sublayers keep norms of their own", r"if index % block:", "if False:", "test_pretrained_keywords.py"),
    Mutation(
        "the pool reads the first token, also of padding",
        r"if mask is None:\n            first",
        "if True:\n            first",
        "test_pretrained_keywords.py",
    ),
    Mutation(
        "a default id is not embedded",
        r"for name in missing",
        "for name in ()",
        "test_pretrained_keywords.py",
    ),
    Mutation(
        "chunked losses without the changes of logits",
        r"not model\.logit_changes\.keeps_linear",
        "False",
        "test_pretrained_keywords.py",
    ),
    Mutation(
        "the grid of positions is cut",
        r"if not self\.interpolate_positions or rows == columns == side:",
        "if True:",
        "test_pretrained_images.py",
    ),
    Mutation(
        "a window that does not count the token itself",
        r'"attention_window_size", 2048\) - 1',
        '"attention_window_size", 2048)',
        "test_pretrained_families.py -k recurrent",
    ),
    Mutation(
        "an embedding scale that is not rounded",
        r"torch\.tensor\(dim\*\*0\.5, dtype=torch\.bfloat16\)\.item\(\)",
        "dim**0.5",
        "test_pretrained_families.py -k recurrent",
    ),
    Mutation(
        "rows of parts in another order",
        r"unflatten\(0, \(parts, sum\(sizes\)\)\)\.split\(sizes, dim=1\)",
        "unflatten(0, (sum(sizes), parts)).mT.split(sizes, dim=1)",
        "test_pretrained_families.py -k 'qwen3 and next'",
    ),
    Mutation(
        "gains of mixers without their offset begin at 0",
        r"self\.gamma \+= 1\n",
        "pass\n",
        "test_mixers.py -k gains",
    ),
    # long convolutions, and mixers on them
    Mutation(
        "a long filter counts its own token twice",
        r"\[\.\.\., 1:\], \(1, 0\)",
        "[..., :-1], (0, 1)",
        CONVOLUTIONS,
        "mixers/*.py",
    ),
    Mutation(
        "long convolutions wrap around",
        r"size = fast_size\(n \+ taps\.shape\[-1\] - 1\)",
        "size = fast_size(n)",
        CONVOLUTIONS,
        "recurrences/*.py",
    ),
    Mutation("a state is read at its own token", r"n, first=1\)", "n)", CONVOLUTIONS, "mixers/*.py"),
    Mutation(
        "dead tokens decay a state space",
        r"system\.power\(count\)",
        "system.power(torch.full_like(count, n))",
        CONVOLUTIONS,
        "mixers/*.py",
    ),
    Mutation(
        "a Legendre memory of dead tokens",
        r"index = row\.count\(m\[:, 0, 0\]\)",
        "index = torch.full_like(row.count(m[:, 0, 0]), n)",
        CONVOLUTIONS,
        "mixers/*.py",
    ),
    # attention in groups
    Mutation(
        "a group reads its later tokens",
        r"_near\(groups, size\)\.tril\(\)",
        "_near(groups, size)",
        GROUPS,
        "recurrences/*.py",
    ),
    Mutation(
        "groups begin again in each pass",
        r"phase = before\.long\(\)\.remainder\(size\)",
        "phase = torch.zeros_like(before.long())",
        GROUPS,
        "mixers/*.py",
    ),
    # memories that learn, and levels of a binary counter
    Mutation(
        "memories whose chunks never end",
        r"reference = torch\.where\(over, flat, reference\)",
        "pass",
        "test_learning_memories.py -k single_steps",
    ),
    Mutation(
        "memories that read after they write",
        r"read = shares\.before\(\) if rule\.reads_before else shares",
        "read = shares",
        "test_learning_memories.py -k single_steps",
    ),
    Mutation(
        "memories that forget recent gradients",
        r"torch\.where\(place < past, place, place \+ offset\)",
        "place",
        "test_learning_memories.py -k single_steps",
    ),
    Mutation(
        "tokens moved by another phase",
        r"before\.remainder\(chunk\)\.long\(\)",
        "before.remainder(chunk).long() * 0",
        "test_log_linear.py test_learning_memories.py -k 'pieces or single_steps'",
    ),
    Mutation(
        "levels that are not merged",
        r"into = torch\.maximum\(every, level\)\.unsqueeze\(1\)",
        "into = every.expand_as(torch.maximum(every, level)).unsqueeze(1)",
        "test_log_linear.py -k 'pieces or pair'",
    ),
    # recurrences with exponential gates
    Mutation(
        "exponential gates of dead tokens",
        r"(?<=dead|live)\.unsqueeze\((-?1)\), -torch\.inf\)",
        r".unsqueeze(\1), 0.0)",
        GATES,
    ),
    Mutation("exponential gates without a bonus", r"own = log_input \+ bonus", "own = log_input", GATES),
    Mutation(
        "exponential gates read what they write", r"sums\), dim=1\)\.narrow\(1, 0,", "sums), dim=1).narrow(1, 1,", GATES
    ),
    Mutation(
        "exponential gates forget their unit", r"last = units\.select\(dim, n\)", "last = units.select(dim, 0)", GATES
    ),
    Mutation(
        "first values of the first layer",
        r"fn\.begin_at\(number, ",
        "fn.begin_at(0, ",
        "test_mixers.py -k first_values",
    ),
    # recurrences
    Mutation(
        "a recurrence decays by the other half of a chunk",
        r"late \* of_first",
        "late * of_second",
        "test_recurrences.py -k single_features",
        "recurrences/chunks.py",
    ),
    Mutation(
        "a recurrent network reads dead tokens",
        r"\(live > 0\)",
        "(live > -1)",
        "test_recurrent_networks.py",
        "recurrences/loop.py",
    ),
    Mutation(
        "recurrent networks lose their weights' gradient between stretches",
        r"of_recurrent \+=",
        "of_recurrent =",
        "test_recurrent_networks.py -k recomputed",
        "recurrences/loop.py",
    ),
    Mutation("RWKV-7 mixes no values", r"\(first - v\)", "0 * (first - v)", "test_rwkv7.py", "mixers/rwkv7.py"),
    Mutation(
        "channel mixing reads hidden tokens",
        r"if mask is not None:",
        "if False:",
        "test_channel_mix.py",
        "feedforward/channel_mix.py",
    ),
    Mutation(
        "partitions of states are not weighted",
        r"\(shares \* chosen\)",
        "chosen",
        "test_mixer_goldens.py -k sparse",
        "recurrences/partitions.py",
    ),
    Mutation(
        "a threshold leaves weights of hidden keys",
        r"changed if mask is None else changed\.masked_fill\(~mask, 0\.0\)",
        "changed",
        "test_gin.py -k hidden_keys",
        "attention/values/gin.py",
    ),
    Mutation(
        "an own key that was drawn is seen twice",
        r"apart = ~drawn if own_seen is None else own_seen & ~drawn",
        "apart = torch.ones_like(drawn) if own_seen is None else own_seen",
        "test_key_subsampling.py -k gathering_equals",
        "attention/subsampling.py",
    ),
    Mutation(
        "the own score is rounded to half precision",
        r"\(score - coarse\)",
        "(0 * coarse)",
        "test_key_subsampling.py -k half_precision",
        "attention/subsampling.py",
    ),
    Mutation(
        "a causal block draws from the future",
        r"if causal:\n                arrived",
        "if False:\n                arrived",
        "test_key_subsampling.py -k near_keys",
        "attention/subsampling.py",
    ),
)


@dataclass(frozen=True)
class Mutant:
    """One place where a mutation matches.

    Attributes:
        path: of the file, relative to the checkout.
        line: where the match begins, from 1.
        text: the whole file, mutated.
    """

    mutation: Mutation
    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.mutation.name} ({self.path.as_posix()}:{self.line})"


def mutants(mutation: Mutation, root: Path = ROOT) -> Iterator[Mutant]:
    """Yield a mutant for every place where the mutation matches."""
    pattern = re.compile(mutation.pattern, re.MULTILINE)
    for path in sorted((root / PACKAGE).glob(mutation.files)):
        text = path.read_text(encoding="utf-8")
        for match in pattern.finditer(text):
            changed = text[: match.start()] + match.expand(mutation.becomes) + text[match.end() :]
            yield Mutant(mutation, path.relative_to(root), text.count("\n", 0, match.start()) + 1, changed)


def copy_checkout(folder: Path, root: Path = ROOT) -> Path:
    """Copy the package and its tests, without what was built; link the data next to the checkout."""
    copy = folder / "checkout"
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", "images", "site")
    shutil.copytree(root, copy, ignore=ignore)
    if (root.parent / "shared").is_dir():
        (folder / "shared").symlink_to((root.parent / "shared").resolve())
    return copy


def run_tests(checkout: Path, arguments: str) -> tuple[int, str]:
    """Return the exit code of pytest and its last lines; tests that do not exist are left out."""
    chosen = [
        word for word in shlex.split(arguments) if not word.endswith(".py") or (checkout / "tests" / word).exists()
    ]
    chosen = [f"tests/{word}" if word.endswith(".py") else word for word in chosen]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    # `-m` puts the copy in front of an installed package
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "took too long"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])


def verdict(mutant: Mutant, root: Path) -> tuple[bool, str]:
    """Run the tests of a mutant of the checkout `root`: whether one noticed, and a line about it."""
    try:
        compile(mutant.text, str(mutant.path), "exec")
    except SyntaxError as error:
        return False, f"BROKEN    {mutant}: {error}"
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_checkout(Path(folder), root)
        (checkout / mutant.path).write_text(mutant.text, encoding="utf-8")
        code, words = run_tests(checkout, mutant.mutation.tests)
    if code == 1:
        return True, f"noticed   {mutant}"
    if code == 0:
        return False, f"SURVIVED  {mutant}: {mutant.mutation.tests}"
    return False, f"BROKEN    {mutant}: pytest ended with {code}\n{words}"


def main() -> None:
    """Run the mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the mutants without running them")
    parser.add_argument("--jobs", type=int, default=1, help="number of mutants that run at a time")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without any mutation first")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.words or any(word in m.name for word in given.words)]
    made, faults = [], 0
    for mutation in chosen:
        found = list(mutants(mutation))
        made += found
        if not found:
            faults += 1
            print(f"MISSING   {mutation.name}: the mutation does not apply, since nothing matches {mutation.pattern!r}")
    if given.list:
        for mutant in made:
            print(mutant)
        sys.exit(faults > 0)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        checkout = copy_checkout(Path(folder))  # the tree may change while mutants run
        selections = {} if given.trust else dict.fromkeys(mutation.tests for mutation in chosen)
        for tests, (code, words) in zip(
            selections, pool.map(functools.partial(run_tests, checkout), selections), strict=True
        ):
            if code != 0:
                sys.exit(f"without any mutation, `{tests}` ends with {code}:\n{words}")
        for noticed, line in pool.map(functools.partial(verdict, root=checkout), made):
            faults += not noticed
            print(line, flush=True)
    print(f"{len(made)} mutants, {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
