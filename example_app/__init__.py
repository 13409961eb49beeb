"""A small shop: what `asgi_dbsession` looks like in an application."""
