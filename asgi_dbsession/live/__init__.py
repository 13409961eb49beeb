"""A web page that shows which code holds which connection now (optional)."""

from .page import LivePage

__all__ = ["LivePage"]
