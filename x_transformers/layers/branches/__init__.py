"""Parts around the function of a sublayer: norm placement, token shift, dropout, scales on the output."""
