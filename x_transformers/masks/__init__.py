"""Visibility: which keys each query may attend to."""
