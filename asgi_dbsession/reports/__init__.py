"""Optional feature: measures the statements, connections and time of each unit of work."""
