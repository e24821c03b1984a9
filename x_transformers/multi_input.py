"""An import path that scripts use. What it names lives in `models`."""

from x_transformers.models.multi_input import MultiInputTransformerWrapper

__all__ = ["MultiInputTransformerWrapper"]
