"""Checks if a database answers, and how full its pool is (optional)."""
