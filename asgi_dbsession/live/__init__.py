"""A web page that shows which code is holding which database connection now (optional)."""

from .page import LivePage

__all__ = ["LivePage"]
