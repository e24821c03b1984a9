"""Pretraining on random data that random recurrent networks transform, without any text (2506.20057)."""

from __future__ import annotations

from collections.abc import Callable
from random import uniform
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.decoding.loop import check_next_token_net
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.ops import values_can_be_read
from x_transformers.options.configured import Configured
from x_transformers.options.schema import at_least

__getattr__ = names_of(__name__)


class SyntheticDataGenerator(Configured, nn.Module):
    """A random recurrent network over tokens, from which sequences are drawn: a source of structure to learn.

    Args:
        dim: width of its embeddings.
        num_tokens: size of the vocabulary.
        max_seq_len: number of last tokens that `generate` returns.
        hidden_size: width of the state; default `dim`.
        use_gru: a gated recurrent unit instead of an LSTM.
        network_klass: builds another recurrent network, `(dim, hidden_size)`, batch first like `nn.LSTM`.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        max_seq_len: int = 512,
        hidden_size: int | None = None,
        use_gru: bool = False,
        network_klass: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, num_tokens=num_tokens, max_seq_len=max_seq_len, hidden_size=hidden_size)
        if use_gru and network_klass is not None:
            raise ConfigError("`use_gru` and `network_klass` both say what the network is; give only one of them.")
        hidden_size = dim if hidden_size is None else hidden_size
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.embed = nn.Embedding(num_tokens, dim)
        if network_klass is not None:
            try:
                self.net = network_klass(dim, hidden_size)
            except TypeError as error:
                raise ConfigError(
                    f"`network_klass` cannot be called with the widths {dim} and {hidden_size}: {error}."
                ) from error
        else:
            self.net = (nn.GRU if use_gru else nn.LSTM)(dim, hidden_size, batch_first=True)
        self.to_logits = LinearNoBias(hidden_size, num_tokens)
        self.apply(self.init_)

    def reset_(self) -> None:
        """Draw all weights again, so that the network becomes another source."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.apply(self.init_)

    @torch.no_grad()
    def init_(self, m: nn.Module) -> None:
        """Scale the weight of a linear map by a random number between 0 and 1.1; other modules stay as they are."""
        if isinstance(m, nn.Linear):
            m.weight *= uniform(0.0, 1.1)

    @torch.no_grad()
    @checked
    def generate(
        self, length: int, seed: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1e-4
    ) -> Tensor:
        """Draw tokens that follow others, each from `softmax(logits / temperature)`.

        Args:
            length: number of tokens to draw.
            seed, condition: `(b, n)` ids each, what they follow: first the seed, then the condition. At least one.
            temperature: divides the logits, positive.

        Returns:
            `(b, m)` ids: what was given and drawn, the last `max_seq_len` of them.

        Raises:
            InputError: with what was given and what is needed.
        """
        given = [part for part in (seed, condition) if part is not None]
        if not given:
            raise InputError("give `seed` or `condition`, tokens to begin with.")
        if length < 0 or temperature <= 0:
            raise InputError(
                f"`length` is {length} and `temperature` {temperature}; they must be at least 0, and larger than 0."
            )
        given = [checked_ids(part, self) for part in given]
        if len({len(part) for part in given}) > 1 or sum(part.shape[1] for part in given) == 0:
            shapes = [tuple(part.shape) for part in given]
            raise ShapeError(f"`seed` and `condition` have the shapes {shapes}; each row must have an id.")
        prefix = torch.cat(given, dim=-1).long()
        known = values_can_be_read() and prefix.numel() > 0
        if known and not 0 <= int(prefix.min()) <= int(prefix.max()) < self.num_tokens:
            raise TokenRangeError(f"`seed` and `condition` must hold ids from 0 to {self.num_tokens - 1}.")
        tokens, state = [prefix], None
        for _ in range(length):
            logits, state = self(tokens[-1], state)
            probs = (logits[:, -1].float() / float(temperature)).softmax(dim=-1)
            tokens.append(probs.multinomial(1))
        return torch.cat(tokens, dim=-1)[:, -self.max_seq_len :]

    def forward(self, input: Tensor, hiddens: Any = None) -> tuple[Tensor, Any]:
        """Return logits `(b, n, v)` of `(b, n)` ids, and the state after them.

        Args:
            input: ids.
            hiddens: the state before them.
        """
        states, hiddens = self.net(self.embed(input), hiddens)
        return self.to_logits(states), hiddens


class UniversalPretrainWrapper(SavesFolders):
    """Training of a decoder on sequences of a buffer that random networks keep rewriting.

    Each call draws sequences of the buffer and the beginnings of others, lets the generator continue them, replaces
    some rows of the buffer by fresh noise, writes what was generated to the rows that it continues, and returns the
    loss of the next token of a batch of the buffer. `torch.compile` leaves the generator out of its graphs, since
    PyTorch does not trace recurrent networks.

    Args:
        model: a causal decoder.
        data_generator: default a `SyntheticDataGenerator` of the model's width and vocabulary.
        buffer_size: number of sequences, more than `batch_size`; default 20 times as many.
        num_reset: number of rows that become noise in each step, even.
        batch_size: number of sequences of a batch.
        seq_len: number of tokens of a sequence.
        seed_length: number of tokens from other rows that the generator reads first.
        reset_turing_machine_every: number of steps after which the generator's weights are drawn again; 0 for never.
        keep_buffer_on_cpu: keep the buffer in the memory of the host, and out of state dicts.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    synth_data_buffer: Tensor
    step: Tensor

    def __init__(
        self,
        model: TransformerWrapper,
        data_generator: nn.Module | None = None,
        buffer_size: int | None = None,
        num_reset: int = 20,
        batch_size: int = 32,
        seq_len: int = 512,
        seed_length: int = 8,
        reset_turing_machine_every: int = 0,
        keep_buffer_on_cpu: bool = False,
    ) -> None:
        super().__init__()
        net = check_next_token_net(model)
        if not net.attn_layers.causal:
            raise ConfigError("`model` sees the tokens that it should predict; its stack must be causal (a Decoder).")
        buffer_size = batch_size * 20 if buffer_size is None else buffer_size
        _check_sizes(net, buffer_size, num_reset, batch_size, seq_len, seed_length)
        self.model, self.ar_wrapped = model, AutoregressiveWrapper(model)
        if data_generator is None:
            data_generator = SyntheticDataGenerator(net.attn_layers.dim, net.num_tokens, max_seq_len=seq_len)
        longest = getattr(data_generator, "max_seq_len", seq_len)
        if longest < seq_len:
            raise ConfigError(f"`seq_len` is {seq_len}, but `data_generator` returns at most {longest} tokens.")
        self.data_generator, self.num_tokens = data_generator, net.num_tokens
        self.num_reset, self.batch_size, self.seq_len = num_reset, batch_size, seq_len
        self.seed_length, self.reset_turing_machine_every = seed_length, reset_turing_machine_every
        self.register_buffer("step", torch.tensor(0))
        half = buffer_size // 2
        buffer = random_sequences(net.num_tokens, seq_len, half, buffer_size - half)
        self._host_buffer = buffer if keep_buffer_on_cpu else None
        if not keep_buffer_on_cpu:
            self.register_buffer("synth_data_buffer", buffer)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def buffer(self) -> Tensor:
        """The sequences, `(buffer_size, seq_len)`."""
        return self.synth_data_buffer if self._host_buffer is None else self._host_buffer

    def get_rand_sequences_from_buffer(self, size: int | None = None) -> Tensor:
        """Return a copy of `size` random rows of the buffer, by default a batch, on the model's device."""
        return self._rows(self._draw(self.batch_size if size is None else size))

    def _draw(self, count: int) -> Tensor:
        """Return the indices of different random rows."""
        return torch.randperm(len(self.buffer), device=self.buffer.device)[:count]

    def _rows(self, index: Tensor) -> Tensor:
        return self.buffer[index].to(self.device)

    @checked
    def forward(self) -> Tensor:
        """Rewrite a part of the buffer, and return the loss of a batch of it.

        Returns:
            A scalar.
        """
        continued = self._draw(self.batch_size)
        generated = self.data_generator.generate(self.seq_len, seed=self._seeds(), condition=self._rows(continued))  # type: ignore[operator]
        self.step += 1
        every = self.reset_turing_machine_every
        if every > 0 and int(self.step) % every == 0:
            self.data_generator.reset_()  # type: ignore[operator]
        fresh, noise = self._draw(self.num_reset), self.num_reset // 2
        with torch.no_grad():
            rows = random_sequences(self.num_tokens, self.seq_len, noise, noise, device=self.buffer.device)
            self.buffer[fresh] = rows
            # after the noise: of a row that both were drawn for, the sequence that was generated stays
            self.buffer[continued] = generated[:, -self.seq_len :].to(self.buffer.device)
        return self.ar_wrapped(self.get_rand_sequences_from_buffer())

    def _seeds(self) -> Tensor:
        """Return `(batch, seed_length)` random windows of random rows."""
        rows = self.get_rand_sequences_from_buffer()
        first = torch.randint(self.seq_len - self.seed_length + 1, (len(rows), 1), device=rows.device)
        return rows.gather(1, first + torch.arange(self.seed_length, device=rows.device))


def random_sequences(
    num_tokens: int,
    seq_len: int,
    num_samples_random: int,
    num_samples_constant: int,
    shuffle: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Return sequences of random tokens, and sequences that repeat one token, the same in all of them.

    Args:
        num_tokens: size of the vocabulary.
        seq_len: number of tokens of a sequence.
        num_samples_random, num_samples_constant: number of sequences of each kind.
        shuffle: mix the two kinds.
        device: of the result.

    Returns:
        `(random + constant, seq_len)` ids.
    """
    noise = torch.randint(num_tokens, (num_samples_random, seq_len), device=device)
    constant = torch.randint(num_tokens, (1, 1), device=device).expand(num_samples_constant, seq_len)
    rows = torch.cat((noise, constant))
    return rows[torch.randperm(len(rows), device=device)] if shuffle else rows


def _check_sizes(
    net: TransformerWrapper, buffer: int, num_reset: int, batch: int, seq_len: int, seed_length: int
) -> None:
    if batch < 1 or buffer <= batch:
        raise ConfigError(
            f"`buffer_size` is {buffer} and `batch_size` {batch}; the buffer must hold more than a batch of at least 1."
        )
    if num_reset < 0 or num_reset % 2 or num_reset > buffer:
        raise ConfigError(
            f"`num_reset` is {num_reset}; it must be even, since half of these rows are random and half constant, and "
            f"at most the size of the buffer, {buffer}."
        )
    if seq_len < 2 or not 0 <= seed_length <= seq_len:
        raise ConfigError(
            f"`seq_len` is {seq_len} and `seed_length` {seed_length}; the first must be at least 2, and the second at "
            "most the first."
        )
    if net.pos_emb is not None and net.max_seq_len < seq_len:
        raise ConfigError(
            f"`seq_len` is {seq_len}, but the model has a table of {net.max_seq_len} positions (`max_seq_len`)."
        )
