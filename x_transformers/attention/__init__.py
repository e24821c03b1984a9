"""Everything between x and attention's output."""
