"""Runs a request again, or answers 503 (optional)."""
