"""Translates the options in a hosting provider's URL for the Python driver."""
