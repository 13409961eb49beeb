"""Uses an engine that the application has made, for `from_engine`."""
