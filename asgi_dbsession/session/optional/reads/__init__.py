"""Lets a session on PostgreSQL or MariaDB read without BEGIN and COMMIT."""
