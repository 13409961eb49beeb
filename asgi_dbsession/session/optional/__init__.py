"""Features that are imported when an application uses them for the first time."""
