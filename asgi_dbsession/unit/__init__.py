"""Which sessions one unit of work opened, and how they end together."""
