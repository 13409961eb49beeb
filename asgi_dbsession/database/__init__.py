"""The databases of an application: URLs, options, engines, startup and shutdown."""
