"""Feedforward networks: expand, activate, project back."""
