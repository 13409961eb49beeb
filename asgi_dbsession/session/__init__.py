"""Each session is used by one task at a time. Its COMMIT stores all of its work, or nothing."""
