"""Other implementations, in an environment of their own."""
