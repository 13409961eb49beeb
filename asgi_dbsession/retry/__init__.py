"""Retries a request after a conflict, and answers 503 if no connection is free (optional)."""
