"""Sessions that two tasks cannot use at once, and that never commit only a part of their work."""
