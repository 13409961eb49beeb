"""The database objects of an application: URLs, options, engines, startup and shutdown."""
