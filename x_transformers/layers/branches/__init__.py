"""What may stand between a sublayer and the residual stream."""
