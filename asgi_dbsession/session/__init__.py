"""Sessions for one task or thread at a time, which commit all of their work or nothing."""
