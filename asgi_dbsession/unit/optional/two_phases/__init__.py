"""Commits the work of a request on several databases together, in two phases."""
