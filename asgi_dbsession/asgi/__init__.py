"""Which ASGI message ends what."""
