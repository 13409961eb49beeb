"""Refuses the writes of a session that may only read, in Python and in the database."""
