"""Optional feature: retries requests after a conflict, answers 503 if no connection is free."""
