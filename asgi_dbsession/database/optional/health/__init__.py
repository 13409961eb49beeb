"""Checks if a database answers, and how many connections of its pool are in use."""
