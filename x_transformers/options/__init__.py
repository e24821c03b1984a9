"""Keywords: flat outside, typed inside."""
