"""Sessions that one task or thread uses at a time, and that commit all of their work or nothing."""
