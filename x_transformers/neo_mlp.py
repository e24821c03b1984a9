"""An import path that scripts use. What it names lives in `models`."""

from x_transformers.models.neo_mlp import NeoMLP, RandomFourierEmbed

__all__ = ["NeoMLP", "RandomFourierEmbed"]
