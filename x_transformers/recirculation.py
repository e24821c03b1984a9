"""Deep states of a token leaked into a shallower layer, which then reads the token again (2608.17981)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.decoding.generation_inputs import cut_arguments
from x_transformers.decoding.loop import check_next_token_net
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_counts, checked, read_mask
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.losses import mean_over, token_losses
from x_transformers.models.delegate import ModelDelegate
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import evaluating
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.schema import at_least, require

__getattr__ = names_of(__name__)

Route = tuple[int, int]
"""Indices of two self-attentions, source and destination."""


def logit(p: float) -> float:
    """Return `log(p / (1 - p))`."""
    return math.log(p / (1 - p))


def norm_matched(z_source: Tensor, z_dest: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the source with the length of the destination, `(..., d)` both; 0 if its own length is at most `eps`."""
    length = z_source.norm(dim=-1, keepdim=True)
    scaled = z_source * (z_dest.norm(dim=-1, keepdim=True) / length.clamp(min=eps))
    return scaled.masked_fill(length <= eps, 0.0)


class RecirculationMixer(LoadsWhole):
    """Learned coefficients of source and destination, `sigmoid(mlp(LN([source; destination])))`.

    Args:
        dim: width of both.
        hidden: inner width; default `dim`.
        init_alpha, init_beta: coefficients of source and destination at first, about.
    """

    def __init__(self, dim: int, hidden: int | None = None, init_alpha: float = 0.1, init_beta: float = 0.9) -> None:
        super().__init__()
        at_least(1, dim=dim, hidden=hidden)
        for name, value in (("init_alpha", init_alpha), ("init_beta", init_beta)):
            require(0 < value < 1, f"`{name}` is {value}; it must lie between 0 and 1.")
        hidden = dim if hidden is None else hidden
        self.input_norm = nn.LayerNorm(dim * 2)
        self.mlp = nn.Sequential(
            nn.Linear(dim * 2, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim * 2)
        )
        last: Any = self.mlp[-1]
        nn.init.normal_(last.weight, std=0.02)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([logit(init_alpha)] * dim + [logit(init_beta)] * dim))

    def forward(self, z_source: Tensor, z_dest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of both, `(..., d)` like them."""
        alpha, beta = self.mlp(self.input_norm(torch.cat((z_source, z_dest), dim=-1))).sigmoid().chunk(2, dim=-1)
        return alpha, beta


class Recirculation(SavesFolders, ModelDelegate):
    """A trained decoder that reads each token twice; it can be used in an `AutoregressiveWrapper` like the decoder.

    The first pass of a token gives its logits. In the second one the inputs of some self-attentions, the destinations,
    are mixed with those of deeper ones, the sources, and only its keys and values stay in the cache, so that later
    tokens read improved ones:

        mix = alpha * source * |destination| / |source| + beta * destination

    The residual stream itself is not changed. Alpha grows from 0 over the first tokens of a row.

    Args:
        net: the decoder.
        source_layer, destination_layer: indices of self-attentions, from 0, or a sequence of each for several routes;
            destinations differ, and lie before their sources.
        alpha: coefficient of the source.
        beta: coefficient of the destination; default `1 - alpha`.
        ramp_steps: number of tokens over which alpha grows; 0 for none.
        use_learned: coefficients of each feature from a `RecirculationMixer`, which `learn_parameters` trains.
        learned_hidden: its inner width; default that of the decoder.

    Raises:
        ConfigError: if the model cannot read tokens twice, or an option is out of range or without effect.
    """

    def __init__(
        self,
        net: TransformerWrapper,
        source_layer: int | Sequence[int],
        destination_layer: int | Sequence[int],
        alpha: float = 0.15,
        beta: float | None = None,
        ramp_steps: int = 10,
        use_learned: bool = False,
        learned_hidden: int | None = None,
    ) -> None:
        super().__init__()
        model = check_next_token_net(net)
        stack = model.attn_layers
        if not model.can_cache_kv or model.looped:
            raise ConfigError("`net` must be able to cache keys and values, and not be looped: tokens are read twice.")
        if stack.num_residual_streams > 1:
            raise ConfigError(
                f"`net` has {stack.num_residual_streams} residual streams, of which states cannot be mixed; use one "
                "(`num_residual_streams = 1`)."
            )
        self.routes = _routes(source_layer, destination_layer, stack.sequence.count("a", stack.sequence.order))
        if ramp_steps < 0:
            raise ConfigError(f"`ramp_steps` is {ramp_steps}; it is a number of tokens, 0 or more.")
        if learned_hidden is not None and not use_learned:
            raise ConfigError("`learned_hidden` is the width of a mixer that is not built; set `use_learned = True`.")
        self.net, self.alpha, self.beta, self.ramp_steps = net, alpha, beta, ramp_steps
        self.learned_mixers = None
        if use_learned:
            self.learned_mixers = nn.ModuleList(RecirculationMixer(stack.dim, learned_hidden) for _ in self.routes)

    def mix_coefficients(self, route: int, z_source: Tensor, z_dest: Tensor, step: int | Tensor = 0) -> tuple[Any, Any]:
        """Return alpha and beta of a route.

        Args:
            route: its number.
            z_source, z_dest: `(..., b, 1, d)` states.
            step: number of tokens before this one, one for all rows or `(b, 1, 1)`.
        """
        if self.learned_mixers is not None:
            return self.learned_mixers[route](z_source, z_dest)
        alpha: Any = self.alpha
        if self.ramp_steps > 0:
            grown = torch.as_tensor(step, device=z_dest.device).clamp(0, self.ramp_steps) / self.ramp_steps
            alpha = (self.alpha * grown).to(z_dest.dtype)
        return alpha, 1 - alpha if self.beta is None else self.beta

    def mix(self, hiddens: Sequence[Tensor], step: int | Tensor = 0) -> dict[int, Tensor]:
        """Return the inputs of the destinations.

        Args:
            hiddens: `(b, columns, d)` input of each self-attention, of which the last column is the token;
                `(3, b, columns, d)` if queries, keys and values have inputs of their own.
            step: as in `mix_coefficients`.

        Returns:
            Index of the destination to `(b, 1, d)` or `(3, b, 1, d)`.
        """
        inputs = {}
        for route, (source, dest) in enumerate(self.routes):
            z_source, z_dest = hiddens[source][..., -1:, :], hiddens[dest][..., -1:, :]
            if z_source.ndim > z_dest.ndim:
                z_source = z_source[0]  # that of queries, which gates and shifts read too
            alpha, beta = self.mix_coefficients(route, z_source, z_dest, step)
            inputs[dest] = alpha * norm_matched(z_source, z_dest) + beta * z_dest
        return inputs

    def recirculate(
        self,
        x: Tensor,
        cache: LayerIntermediates | KVCache,
        seq_start_pos: Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
        step: int | Tensor = 0,
    ) -> tuple[Any, LayerIntermediates]:
        """Read one token twice.

        Args:
            x: `(b, 1)` ids.
            cache: what was read before; it is left as it is, if it is not static.
            seq_start_pos: `(b,)` number of padding tokens on the left.
            kwargs: of the model's passes, for this token.
            step: as in `mix_coefficients`.

        Returns:
            The output of the first pass, and the record of the second one, with the cache.
        """
        given: dict[str, Any] = {
            **(kwargs or {}),
            "seq_start_pos": seq_start_pos,
            "input_not_include_cache": True,
            "return_intermediates": True,
        }
        out, first = self.net(x, cache=cache, capture=Capture(hiddens=True), **given)
        # what the norms read: in some stacks this is not the stream itself, but made of it
        inputs = self.mix(first.memory_inputs, step)
        _, record = self.net(x, cache=cache, capture=Capture(), self_attn_inputs=inputs, **given)
        record.include_routing([first])
        return out, record

    @checked
    @passes_on("net", but=("self_attn_inputs",))
    def forward(
        self,
        x: Ids,
        cache: LayerIntermediates | KVCache | None = None,
        return_intermediates: bool = False,
        seq_start_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read tokens one after the other, twice each.

        Args:
            x: `(b, n)` ids; with a cache only those that are not in it.
            cache: what was read before.
            return_intermediates: also return the record of the last pass, whose cache a later call takes.
            seq_start_pos: `(b,)` number of padding tokens on the left.
            kwargs: of the model's passes.

        Returns:
            Logits `(b, n, v)`, those of each token's first pass; with `return_intermediates` `(logits, record)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        x = checked_ids(x, self)
        own = _checked(kwargs, x)
        if seq_start_pos is not None:
            check_counts(seq_start_pos, "seq_start_pos", None, len(x))
        kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
        kv = KVCache() if kv is None else kv
        n, outputs, record, records = x.shape[1], [], LayerIntermediates(cache=kv), []
        for place in range(n):
            arguments = own if n == 1 else _of_token(own, place, n)
            assert record.cache is not None
            before = record.cache.count_tokens(interspersed=unwrapped(self.net).layout.every is not None)
            step: Any = before if seq_start_pos is None else before - seq_start_pos.view(-1, 1, 1)
            out, record = self.recirculate(x[:, place : place + 1], record.cache, seq_start_pos, arguments, step)
            outputs.append(out)
            records.append(record)
            for name in ("prepend_embeds", "prepend_mask"):
                own.pop(name, None)  # they are in the cache now
        if kwargs.get("excise_prepend_embeds"):
            outputs[0] = outputs[0][:, -1:]
        logits = torch.cat(outputs, dim=1)
        keep = kwargs.get("logits_to_keep")
        logits = logits[:, -keep:] if keep else logits
        record.include_routing(records[:-1])
        return (logits, record) if return_intermediates or kwargs.get("return_aux_loss") else logits

    def learn_parameters(
        self,
        x: Ids,
        steps: int = 100,
        optimizer_cls: Any = torch.optim.AdamW,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        ignore_index: int = 0,
    ) -> float:
        """Train the mixers, and nothing else, by the loss of the next token.

        Args:
            x: `(b, n)` ids, rows of which are drawn with repetition.
            steps: number of steps.
            optimizer_cls, optimizer_kwargs: the optimizer; default AdamW with a learning rate of 3e-4 and a decay of
                1e-4.
            batch_size: number of rows of a step.
            ignore_index: label that does not count. In the input it is replaced by id 0.

        Returns:
            The last loss.

        Raises:
            InputError: if there are no mixers, or nothing to predict.
        """
        if self.learned_mixers is None:
            raise InputError("there is nothing to learn: build with `use_learned = True`.")
        x = checked_ids(x, self).long()
        if x.shape[0] == 0 or x.shape[1] < 2 or steps < 1:
            raise ShapeError(f"x has shape {tuple(x.shape)} and `steps` is {steps}; give rows of 2 or more tokens.")
        given = {"lr": 3e-4, "weight_decay": 1e-4} if optimizer_kwargs is None else dict(optimizer_kwargs)
        learned = list(self.learned_mixers.parameters())
        optimizer, log_probs = optimizer_cls(learned, **given), unwrapped(self.net).output_is_log_prob
        last = math.nan
        with evaluating(self.net), torch.enable_grad():
            for _ in range(steps):
                rows = x[torch.randint(len(x), (batch_size,), device=x.device)]
                labels = rows[:, 1:]
                logits = self(rows[:, :-1].masked_fill(rows[:, :-1] == ignore_index, 0))
                each = token_losses(logits, labels, ignore_index=ignore_index, log_probs=log_probs)
                loss = mean_over(each, labels != ignore_index)
                # of the mixers only: the decoder keeps the gradients that it has
                gradients = torch.autograd.grad(loss, learned, allow_unused=True)
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                optimizer.zero_grad()
                last = loss.item()
        return last


def _routes(sources: int | Sequence[int], dests: int | Sequence[int], count: int) -> tuple[Route, ...]:
    """Return the pairs of source and destination."""
    sources = (sources,) if isinstance(sources, int) else tuple(sources)
    dests = (dests,) if isinstance(dests, int) else tuple(dests)
    if len(sources) != len(dests) or not sources or len(set(dests)) < len(dests):
        raise ConfigError(
            f"`source_layer` is {sources} and `destination_layer` {dests}; there must be as many of both, at least "
            "one, and destinations must differ."
        )
    for source, dest in zip(sources, dests, strict=True):
        if not 0 <= dest < source < count:
            raise ConfigError(
                f"a route leads from self-attention {source} to {dest}; it must lead to an earlier one, of 0 to "
                f"{count - 1}."
            )
    return tuple(zip(sources, dests, strict=True))


TAKEN = ("return_logits_and_embeddings", "return_embeddings_and_intermediates", "return_next_embed_pred", "return_mems")
TAKEN = (*TAKEN, "return_attn", "return_attn_z_loss", "return_logit_entropies", "mems", "attn_mask", "attn_bias")


def _checked(kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """Return the arguments of passes of single tokens."""
    for name in TAKEN:
        given = kwargs.get(name)
        # a tensor is compared with nothing
        if given is not None and given is not False:
            raise InputError(f"`{name}` is about all tokens of a pass, and these are read one by one; call the net.")
    if x.shape[1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; there is no token to read.")
    dropped = ("capture", "logits_to_keep", "input_not_include_cache", "excise_prepend_embeds")
    given = {name: value for name, value in kwargs.items() if name not in (*TAKEN, *dropped) and value is not None}
    for name in ("mask", "self_attn_kv_mask"):
        if name in given:
            given[name] = read_mask(given[name], name)
            if given[name].ndim != 2:
                raise ShapeError(f"`{name}` has shape {tuple(given[name].shape)}; it must be ({len(x)}, tokens).")
    return given


def _of_token(given: Mapping[str, Any], place: int, n: int) -> dict[str, Any]:
    """Return the arguments of the pass of one of n tokens."""
    masks = {name: given[name] for name in ("mask", "self_attn_kv_mask") if name in given}
    arguments = cut_arguments({name: t for name, t in given.items() if name not in masks}, place, place + 1, n)
    for name, mask in masks.items():
        # over cached tokens too, which stay hidden
        arguments[name] = mask[:, : mask.shape[1] - (n - 1 - place)]
    return arguments
