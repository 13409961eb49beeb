"""Reports of the statements, connections and time that a unit of work used (optional)."""
