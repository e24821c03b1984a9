"""Files: models with their configuration, and training runs that can be resumed."""
