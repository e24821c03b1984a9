"""Residual connections: reading the residual stream for a sublayer, and writing the sublayer's output back."""
