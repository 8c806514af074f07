"""Check a user's model, adapter and data: losses against the plain forward, rows against its central differences."""
