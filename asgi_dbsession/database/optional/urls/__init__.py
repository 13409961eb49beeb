"""Translates options in a database URL, such as `?sslmode=require`, for the Python driver.

Hosting providers give their customers database URLs with options that the driver does not know.
"""
