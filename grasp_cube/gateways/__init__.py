"""Other protocols in front of the same scheduler and policy."""
