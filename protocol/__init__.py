"""The wire of llama-bridge: no I/O, no trio, no llama.cpp. PROTOCOL.md is its specification."""

PROTOCOL_VERSION = 1
