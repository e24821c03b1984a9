"""Modifications of values before attention, and of its outputs."""
