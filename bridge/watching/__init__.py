"""How the daemon is and what it has counted, for those who watch it: over the wire, over HTTP, for a balancer."""
