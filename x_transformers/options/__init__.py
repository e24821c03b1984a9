"""Keyword options: flat keywords for users, typed dataclasses inside the library."""
