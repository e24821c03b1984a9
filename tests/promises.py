"""Promises of every causal model, as checks that tests of features, of pairs and of head counts share.

Each check takes a model and raises an `AssertionError` where it breaks the promise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from catalog import (
    DIM,
    VOCABULARY,
    call,
    close,
    context_width,
    contexts,
    decode,
    further_ids,
    other_inputs,
    static_cache,
    tokens,
)
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, TransformerWrapper

LENGTH = 10
LENGTHS = (10, 7, 3)
CHUNKS = (4, 3, 1, 2)
SEEN = 1e-4
"""Least difference of outputs that have to differ."""

SEVERAL = 4
"""Number of tokens that are tried at a place."""


def another(ids: Tensor) -> Tensor:
    """Tokens that differ from the given ones everywhere."""
    return (ids + torch.randint_like(ids, 1, VOCABULARY)) % VOCABULARY


def arguments(model: TransformerWrapper, batch: int, n: int, rows: int = 1) -> dict[str, dict[str, Any]]:
    """Ways to call a causal model, by name: the arguments of a pass over `n` tokens.

    Args:
        model: the model.
        batch: rows of the pass; the arguments are the same for each unless `rows` says otherwise.
        n: tokens.
        rows: how many different rows of arguments to draw.
    """
    heads = model.attn_layers.heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape).repeat(batch // rows, *(1 for _ in shape))

    mask, kv_mask = draw(n) > -0.5, draw(n) > -0.5
    mask[:, 0] = kv_mask[:, 0] = True
    pairs = (draw(heads, n, n) > 0) | torch.eye(n, dtype=torch.bool)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "mask": {"mask": mask},
        "kv_mask": {"self_attn_kv_mask": kv_mask},
        "both_masks": {"mask": mask, "self_attn_kv_mask": kv_mask},
        "left_padding": {"seq_start_pos": torch.full((batch,), 2)},
        "packed": {"pos": torch.arange(n) % 3},
        "attn_mask": {"attn_mask": pairs},
        "attn_bias": {"attn_bias": draw(heads, n, n)},
        "sum_embeds": {"sum_embeds": draw(1, model.emb_dim).expand(-1, n, -1)},
        "prepended": {"prepend_embeds": draw(2, model.emb_dim), "prepend_mask": draw(2) > 0},
        "memories": {"mems": [draw(4, DIM) for _ in model.attn_layers.branches("a")]},
    }
    if model.attn_layers.branches("m"):  # mixers have no pairs of tokens, which they say: `tests/test_mixers.py`
        del ways["attn_mask"], ways["attn_bias"]
    return ways


@torch.no_grad()
def keeps_the_past(model: TransformerWrapper, n: int = LENGTH, **given: Any) -> None:
    """Outputs before `t` do not change with the tokens from `t` on; the output at `t` does.

    One pass holds every `t`: row `t` of the batch has other tokens from `t` on.
    """
    ids = tokens(1, n).expand(n, n)
    future = torch.arange(n) >= torch.arange(n)[:, None]
    rows = [0] * n
    extra = 0 if "prepend_embeds" not in given else given["prepend_embeds"].shape[1]
    one = call(model, ids, rows, **given)[:, extra:]
    other = call(model, torch.where(future, another(ids), ids), rows, **given)[:, extra:]
    close(other[~future], one[~future])
    moved = (other - one).flatten(2).abs().amax(dim=-1).diagonal()
    alive = torch.ones(n, dtype=torch.bool)
    if "seq_start_pos" in given:
        alive = torch.arange(n) >= given["seq_start_pos"][0]
    assert (moved[alive] > SEEN).all(), "the token at t changes nothing at t, so that this test cannot notice anything"


@torch.no_grad()
def keeps_its_length(model: TransformerWrapper, n: int = LENGTH) -> None:
    """Outputs do not change when tokens are removed from the end."""
    ids = tokens(2, n)
    whole = call(model, ids)
    for end in (1, 4, n - 1):
        close(call(model, ids[:, :end]), whole[:, :end])


@torch.no_grad()
def decodes(model: TransformerWrapper, *, static: bool, whole: bool = False, chunks: Iterable[int] = CHUNKS) -> None:
    """Cached decoding equals one pass."""
    chunks = list(chunks)
    ids = tokens(2, sum(chunks))
    cache = static_cache(model, 2, ids.shape[1] + 3) if static else None
    close(decode(model, ids, chunks, cache=cache, whole=whole), call(model, ids))


@torch.no_grad()
def pads(model: TransformerWrapper, *, left: bool) -> None:
    """Each row of a ragged batch equals the row by itself, whatever its padding contains."""
    n = max(LENGTHS)
    ids = tokens(len(LENGTHS), n)
    lengths = torch.tensor(LENGTHS)
    if left:
        given = {"seq_start_pos": n - lengths}
    else:
        given = {"mask": torch.arange(n) < lengths[:, None]}
    together = call(model, ids, **given)
    for row, length in enumerate(LENGTHS):
        own = slice(n - length, n) if left else slice(length)
        close(together[row : row + 1, own], call(model, ids[row : row + 1, own], [row]))


@torch.no_grad()
def decodes_ragged(model: TransformerWrapper, *, static: bool) -> None:
    """A left-padded batch decodes to the same as each row by itself."""
    n = max(LENGTHS)
    ids = tokens(len(LENGTHS), n)
    start = n - torch.tensor(LENGTHS)
    cache = static_cache(model, len(LENGTHS), n + 2) if static else None
    together = decode(model, ids, CHUNKS, cache=cache, seq_start_pos=start)
    for row, length in enumerate(LENGTHS):
        close(together[row : row + 1, n - length :], call(model, ids[row : row + 1, n - length :], [row]))


def every_output(model: TransformerWrapper, ids: Tensor, **given: Any) -> Tensor:
    """Run one pass; the output, stacked with those of exits, if there are any."""
    if not model.exit_layers:
        return call(model, ids, **given)
    out, exits = call(model, ids, **given, return_exits=True)
    return torch.stack((out, *exits.values()))


def learns(model: TransformerWrapper, without: Iterable[re.Pattern[str]] = ()) -> None:
    """Every parameter gets a finite gradient that is not zero, except those named, whose gradient is zero.

    In float64, where rounding stays far below any gradient that is one.
    """
    for name, gradient in gradients(model.double()):
        size = gradient.abs().max()
        if any(pattern.search(name) for pattern in without):
            assert size < 1e-9, f"{name} is exempt, but has a gradient"
        else:
            assert size > 1e-9, f"{name} has a gradient of zero"


def running(model: TransformerWrapper) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters, without those of layers that are built and never run (`layers_execute_order`)."""
    stack = model.attn_layers
    resting = [i for i in range(len(stack.layers)) if i not in stack.sequence.order]
    idle = tuple(f"attn_layers.{part}.{i}." for i in resting for part in ("layers", "skip_combines"))
    idle += tuple(f"attn_layers.depth_routers.{i // stack.sequence.block}." for i in resting)
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(idle)]


def gradients(model: TransformerWrapper, **given: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients of all parameters that run, each of which is used and has a finite one.

    In a combination some may be zero by right: a gain before a norm, a bias of all keys before a softmax.
    """
    out = every_output(model, tokens(3, LENGTH), **given)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in running(model):
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        yield name, parameter.grad


# The same promises for thousands of models: each row of a ragged batch runs by itself once, and everything else is
# compared with it.

PROMPTS, NEW = (5, 3, 1), 3
"""Lengths of ragged prompts, and number of new tokens."""


class Trial:
    """A model and its outputs for rows of several lengths, each run by itself.

    Args:
        model: the model.
        build: makes another one like it, with other weights each time.
    """

    @torch.no_grad()
    def __init__(self, model: TransformerWrapper, build: Callable[[], TransformerWrapper]) -> None:
        self.model, self.build = model, build
        self.ids = tokens(len(LENGTHS), LENGTH)
        self.lengths = torch.tensor(LENGTHS)
        self.start = LENGTH - self.lengths
        self.mask = torch.arange(LENGTH) < self.lengths[:, None]
        self.alone = [call(self.model, self.ids[r : r + 1, :n], [r]) for r, n in enumerate(LENGTHS)]
        # the same rows at the end of the axis, after tokens that must not be seen
        self.late = torch.stack([row.roll(int(s)) for row, s in zip(self.ids, self.start, strict=True)])

    def early(self, together: Tensor) -> None:
        """Check the outputs of rows that begin at the first column."""
        for row, alone in enumerate(self.alone):
            close(together[row : row + 1, : alone.shape[1]], alone)

    def at_the_end(self, together: Tensor) -> None:
        """Check the outputs of rows that end at the last column."""
        for row, alone in enumerate(self.alone):
            close(together[row : row + 1, LENGTH - alone.shape[1] :], alone)


@torch.no_grad()
def is_causal(trial: Trial) -> None:
    """Other tokens from `t` on change the output at `t`, and none before it."""
    n = LENGTH
    ids = trial.ids[:1].expand(n, n)
    future = torch.arange(n) >= torch.arange(n)[:, None]
    one = trial.alone[0].expand(n, -1, -1)
    moved = torch.zeros(n)
    # where an elementwise norm saturates, some tokens change nothing at all, and others do
    for _ in range(SEVERAL):
        other = call(trial.model, torch.where(future, another(ids), ids), [0] * n)
        close(other[~future], one[~future])
        moved = torch.maximum(moved, (other - one).abs().amax(dim=-1).diagonal().to(moved.dtype))
        # of many options together little may be left of one token, but in float64 rounding is far less
        if (moved > SEEN**2).all():
            return
    raise AssertionError("no token at t changes anything at t, so that this test cannot notice anything")


@torch.no_grad()
def is_batched_causally(trial: Trial) -> None:
    """Rows of a batch, cut anywhere, are what they are by themselves."""
    trial.early(call(trial.model, trial.ids))


@torch.no_grad()
def is_batched(trial: Trial) -> None:
    """Rows of a batch are what they are by themselves."""
    together = call(trial.model, trial.ids)
    for row in range(len(LENGTHS)):
        alone = trial.alone[0] if row == 0 else call(trial.model, trial.ids[row : row + 1], [row])
        close(together[row : row + 1], alone)


@torch.no_grad()
def pads_right(trial: Trial) -> None:
    """Tokens that the mask hides at the end do not matter."""
    trial.early(call(trial.model, trial.ids, mask=trial.mask))


@torch.no_grad()
def pads_left(trial: Trial) -> None:
    """Tokens before the start of a row do not matter."""
    trial.at_the_end(call(trial.model, trial.late, seq_start_pos=trial.start))


@torch.no_grad()
def decodes_in_chunks(trial: Trial) -> None:
    """Through a growing cache, chunks and single tokens give the same as each row by itself."""
    trial.early(decode(trial.model, trial.ids, (5, 3, 1, 1)))


@torch.no_grad()
def decodes_ragged_in_chunks(trial: Trial) -> None:
    """Through fixed buffers, rows that start late give the same as each by itself."""
    cache = static_cache(trial.model, len(LENGTHS), LENGTH + 2)
    trial.at_the_end(decode(trial.model, trial.late, (5, 1, 3, 1), cache=cache, seq_start_pos=trial.start))


@torch.no_grad()
def generates(trial: Trial) -> None:
    """Ragged prompts continue with the tokens that are most likely for each of them by itself."""
    prompts = [row[:n] for row, n in zip(trial.ids, PROMPTS, strict=True)]
    given = other_inputs(trial.model, trial.ids)
    if "embed_ids" in given:
        given["embed_ids"] = further_ids(trial.model)
    new = AutoregressiveWrapper(trial.model).generate(prompts, NEW, temperature=0.0, **given)
    for row, prompt in enumerate(prompts):
        whole = torch.cat((prompt, new[row]))[None]
        logits = call(trial.model, whole, [row])[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, new[row, :, None])[:, 0]
        close(chosen, logits.amax(dim=-1), 1e-4)  # equal logits may be told apart by rounding


def has_gradients(trial: Trial) -> None:
    """Every parameter that runs has a finite gradient, also where rows hold nothing but padding."""
    for _ in gradients(trial.model, seq_start_pos=torch.tensor([0, 4, LENGTH])):
        pass


@torch.no_grad()
def reads_its_state(trial: Trial) -> None:
    """Another model with this one's state is this model."""
    twin = trial.build()
    twin.load_state_dict(trial.model.state_dict())
    assert torch.equal(call(twin, trial.ids[:1], [0]), trial.alone[0])


@torch.no_grad()
def masks_its_context(trial: Trial) -> None:
    """A padded context is the shorter one."""
    context = contexts(context_width(trial.model))[: len(LENGTHS)].to(trial.alone[0])
    lengths = torch.tensor([5, 2, 1])
    together = call(trial.model, trial.ids, context=context, context_mask=torch.arange(5) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        own = slice(row, row + 1)
        close(together[own], call(trial.model, trial.ids[own], [row], context=context[own, :length]))


@torch.no_grad()
def is_finite_in_bfloat16(trial: Trial) -> None:
    """Every number is one, in padding too. The model stays in bfloat16."""
    model = trial.model.bfloat16()
    for given in ({"mask": trial.mask}, {"seq_start_pos": trial.start}):
        out = call(model, trial.ids, **given)
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


_BOTH: dict[str, Callable[[Trial], None]] = {
    "right padding": pads_right,
    "left padding": pads_left,
    "gradients": has_gradients,
    "state": reads_its_state,
    "bfloat16": is_finite_in_bfloat16,
}
_CAUSAL: dict[str, Callable[[Trial], None]] = {
    "causality": is_causal,
    "batch": is_batched_causally,
    "decoding in chunks": decodes_in_chunks,
    "ragged decoding": decodes_ragged_in_chunks,
    "generation": generates,
}
PROMISES: dict[str, dict[str, Callable[[Trial], None]]] = {
    "decoder": {**_CAUSAL, **_BOTH},
    "encoder": {"batch": is_batched, **_BOTH},
    "cross": {**_CAUSAL, "context": masks_its_context, **_BOTH},
}
"""Checks of every combination, by kind of stack. The last one changes the model."""
