"""Units of work: the sessions of one request, committed or rolled back together."""
