"""Test-time training: weights that each row of a batch adapts to what it has read, and episodic memory."""
