"""Reading earlier layers."""
