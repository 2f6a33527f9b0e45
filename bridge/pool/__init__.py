"""The models of the daemon: which are loaded, which have to go, who uses them."""
