"""Lets a `begin(join=True)` block use the unit of work around it, as a savepoint (optional)."""
