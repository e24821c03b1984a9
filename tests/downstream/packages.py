"""Packages of other people that import `x_transformers`: distribution and version, by the name of their case."""

PACKAGES = {
    "genie2": ("genie2-pytorch", "0.0.21"),
    "midisimx": ("midisimx", "26.10.26"),
    "h-net": ("h-net-dynamic-chunking", "0.5.19"),
    "metacontroller": ("metacontroller-pytorch", "0.3.3"),
    "meshgpt": ("meshgpt-pytorch", "1.8.1"),
    "x-transformers-rl": ("x-transformers-rl", "0.0.99"),
    "declarative-attention": ("declarative-attention", "0.0.8"),
    "dreamer4": ("dreamer4", "0.20.2"),
    "mimic-video": ("mimic-video", "0.5.8"),
}

ALSO_WITHOUT_DEPENDENCIES = ("x-evolution==0.1.35",)
"""What these import and what itself requires x-transformers; everything else is the extra `downstream`."""

VENDORED = ("midisimx/x_transformer_2_3_1.py",)
"""Modified copies of the original within these packages. They are deleted unread: this library is a clean room."""

STAGES = ("forward", "training step", "sampling")
