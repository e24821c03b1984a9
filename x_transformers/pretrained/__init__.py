"""Models of other libraries: their configurations as keywords, and their weights under our names."""
