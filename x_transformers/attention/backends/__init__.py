"""Kernels that weigh: each says what it can host and why it refuses."""
