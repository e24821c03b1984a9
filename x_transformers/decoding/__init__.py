"""Decoding: filters of logits, sampling, prompts, one step, the loop."""
