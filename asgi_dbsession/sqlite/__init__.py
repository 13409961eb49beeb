"""Sends BEGIN on SQLite, so that a rollback undoes each write."""
