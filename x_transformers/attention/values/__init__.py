"""What happens to values before they are weighed, and to what comes out."""
