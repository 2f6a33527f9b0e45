"""The command line, of the daemon and of those who talk to it."""
