"""One file for each family of pretrained models."""
