"""Routing of tokens to experts: the choice, its losses, and products with the matrices of the chosen."""
