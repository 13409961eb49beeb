"""Calls the functions that an application gives to `on_commit`, after a COMMIT."""

# Import `call` early: if this import failed after a COMMIT, the client would get an error although
# the work is stored.
from . import call

__all__ = ["call"]
