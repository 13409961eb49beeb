"""Explains why a database did not answer, when a connection has failed."""
