"""What a unit of work cost (optional)."""
