"""Building blocks shared by attentions, feedforwards and models."""
