"""Calls the functions of an application that follow a COMMIT."""

# Import `call` together with `on_commit`: if the import failed after a COMMIT, the client would get
# an error although the work is stored.
from . import call

__all__ = ["call"]
