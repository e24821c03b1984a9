"""State of one forward pass, read by every layer."""
