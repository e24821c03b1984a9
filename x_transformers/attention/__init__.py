"""Attention: from the input of a sublayer to its output."""
