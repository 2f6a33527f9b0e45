"""What answers the commands: a module for each kind, tabled in ``bridge.dispatch``."""
