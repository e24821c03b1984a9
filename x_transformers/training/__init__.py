"""Optimizers for the parameters of a model, and training in several processes."""
