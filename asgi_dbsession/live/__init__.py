"""A page that shows who holds which connection, now (optional)."""

from .page import LivePage

__all__ = ["LivePage"]
