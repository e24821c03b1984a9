"""A transformer instead of a multilayer perceptron: inputs, hidden units and outputs are tokens that attend to each
other (openreview A8Vuf2e8y6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.layers.named_stacks import Encoder
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import at_least


class RandomFourierEmbed(LoadsWhole):
    """Random features `cos(2 pi (w x + c))` of numbers x, with w and c that are not trained.

    Args:
        dim: number of features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.proj = nn.Linear(1, dim)
        self.proj.requires_grad_(False)

    def forward(self, times: Tensor) -> Tensor:
        """Map `(...)` numbers to `(..., dim)` features."""
        return (self.proj(times.unsqueeze(-1)) * (2 * math.pi)).cos()


class NeoMLP(SavesFolders):
    """Vectors `(b, dim_in)` to vectors `(b, dim_out)`, by attention between units.

    Input unit i is `W cos(2 pi (w x_i + c)) + b + e_i`; hidden and output units start as learned embeddings. After the
    encoder, output o is `<y_o, v_o> + b_o`, with the features y_o of its unit.

    Args:
        dim_in, dim_hidden, dim_out: number of units of each kind.
        dim_model: width of a unit.
        depth: number of blocks.
        encoder_kwargs: further keywords of the `Encoder`; default four heads of width 16.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        dim_in: int,
        dim_hidden: int,
        dim_out: int,
        dim_model: int,
        depth: int,
        encoder_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, dim_in=dim_in, dim_out=dim_out, dim_model=dim_model)
        at_least(0, dim_hidden=dim_hidden)
        more = {"attn_dim_head": 16, "heads": 4} if encoder_kwargs is None else dict(encoder_kwargs)
        self.sizes = dim_in, dim_hidden, dim_out
        self.input_embed, self.hidden_embed, self.output_embed = (
            nn.Parameter(torch.randn(count, dim_model) * 0.02) for count in self.sizes
        )
        self.random_fourier = nn.Sequential(RandomFourierEmbed(dim_model), nn.Linear(dim_model, dim_model))
        self.transformer = Encoder(dim=dim_model, depth=depth, **more)
        self.to_output_weights = nn.Parameter(torch.randn(dim_out, dim_model))
        self.to_output_bias = nn.Parameter(torch.zeros(dim_out))

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor as plain data, with what loaded weights have changed; see `Configured`."""
        config = super().config
        if self.transformer.reference_mix:
            config["options"]["encoder_kwargs"]["hyper_conn_reference_mix"] = True
        return config

    def adopt_config(self, config: Mapping[str, Any]) -> list[Callable[[], None]]:
        return self.transformer.adopt_config({"options": config["options"].get("encoder_kwargs") or {}})

    @checked
    def forward(self, x: Tensor, return_embeds: bool = False, *, return_aux_loss: bool = False) -> Any:
        """Run the model.

        Args:
            x: `(b, dim_in)` or `(dim_in,)`; integers are converted.
            return_embeds: also return the features of input, hidden and output units, `(b, units, dim_model)` each,
                with b = 1 for a single x.
            return_aux_loss: also return the intermediates of the encoder, with `aux_loss`, the losses of experts.

        Returns:
            `(b, dim_out)` or `(dim_out,)`; a pair of it and what was requested.

        Raises:
            ShapeError: if x has another width or rank.
        """
        if x.is_complex() or x.ndim not in (1, 2) or x.shape[-1] != self.sizes[0]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; it must be (batch, {self.sizes[0]}) or ({self.sizes[0]},)."
            )
        rows = x.reshape(-1, self.sizes[0]).to(self.to_output_bias.dtype)
        inputs = self.random_fourier(rows) + self.input_embed
        units = torch.cat((self.hidden_embed, self.output_embed)).expand(rows.shape[0], -1, -1)
        x_units = torch.cat((inputs, units.to(inputs.dtype)), dim=1)
        found = self.transformer(x_units, return_aux_loss=return_aux_loss)
        features, record = found if return_aux_loss else (found, None)
        embeds = features.split(self.sizes, dim=1)
        out: Any = (embeds[2] * self.to_output_weights).sum(dim=-1) + self.to_output_bias
        out = out if x.ndim == 2 else out.squeeze(0)
        out = (out, embeds) if return_embeds else out
        return out if record is None else (out, record)
