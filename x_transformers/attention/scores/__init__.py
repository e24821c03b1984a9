"""What changes single scores."""
