"""Lets a `begin(join=True)` block run in a savepoint of the unit of work around the block."""
