"""Modifications of scores and of whole rows of logits, before the softmax."""
