"""What happens to queries and keys between their projection and the scores."""
