"""Keywords of the models: options by idea, which model has which, and their checks."""
