"""Token mixers: what a layer can have instead of self-attention, one file a paper."""
