"""Who may do what, and how much of it: roles, tokens, TLS, limits."""
