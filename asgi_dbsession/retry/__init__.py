"""Runs a request again after a conflict, and answers 503 if the pool is exhausted (optional)."""
