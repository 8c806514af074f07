"""Check a user's model, adapter and data: losses against the plain forward, rows against central differences of it."""
