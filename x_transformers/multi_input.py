"""An import path that scripts use. What it names lives in `models`."""

from x_transformers.models.multi_input import MultiInputTransformerWrapper
from x_transformers.modules.conveniences import names_of

__getattr__ = names_of(__name__)

__all__ = ["MultiInputTransformerWrapper"]
