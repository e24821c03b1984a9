"""Models: embeddings, frame, a stack, heads."""
