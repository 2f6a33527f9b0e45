"""Who answers a request: each provider takes one and returns a stream of events."""
