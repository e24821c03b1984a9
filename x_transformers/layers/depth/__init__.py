"""Depth readers: a sublayer's input as a mix of the inputs of all layers so far."""
