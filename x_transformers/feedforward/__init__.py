"""The feedforward: wider, an activation, back."""
