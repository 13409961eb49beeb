"""The middleware: decides which ASGI message commits, rolls back or closes a unit of work."""
