"""Sessions that only one task at a time can use. COMMIT stores all of their work, or nothing."""
