"""The daemon: it owns models and answers the line protocol."""

__version__ = "0.1.0"
