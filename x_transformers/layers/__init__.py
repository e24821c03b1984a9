"""Stacks: from options to layers, and the order in which a layer works."""
