"""Calls the functions that an application gives to `on_commit`, after a COMMIT."""

# The module `call` is needed only after a COMMIT. Import it earlier, together with the function
# `on_commit`. If the import failed after a COMMIT, the client would get an error although the work
# is stored.
from . import call

__all__ = ["call"]
