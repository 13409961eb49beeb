"""Calls the functions that an application has given to `on_commit`, after a COMMIT (optional)."""
