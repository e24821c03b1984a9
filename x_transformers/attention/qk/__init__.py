"""Transforms of queries and keys between their projection and the scores."""
