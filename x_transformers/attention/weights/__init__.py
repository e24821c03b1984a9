"""From logits to weights, in other ways than a softmax."""
