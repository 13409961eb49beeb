"""Measures what each unit of work costs: statements, connections and time (optional)."""
