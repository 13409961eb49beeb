"""Calls the functions of an application that follow a COMMIT."""
