"""Which key each query may attend to."""
