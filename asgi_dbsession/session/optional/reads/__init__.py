"""Lets a session on PostgreSQL read without BEGIN and COMMIT."""
