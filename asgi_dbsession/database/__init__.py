"""Databases: their URLs, options, engines, startup and shutdown."""
