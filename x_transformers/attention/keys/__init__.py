"""Keys and values that are no tokens."""
