"""How a sublayer reads the residual stream and writes to it."""
