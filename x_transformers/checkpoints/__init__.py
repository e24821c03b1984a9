"""Files of models with their configuration, and of training runs that can be resumed."""
