"""Conversions of logits to attention weights other than the softmax, and changes of weights."""
