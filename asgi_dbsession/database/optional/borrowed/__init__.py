"""Makes database objects with an engine of the application: `AsyncDatabase.from_engine(engine)`."""
