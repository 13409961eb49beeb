"""An engine's life."""
