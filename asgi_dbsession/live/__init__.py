"""Optional feature: a web page that shows which code holds which database connection now."""

from .page import LivePage

__all__ = ["LivePage"]
