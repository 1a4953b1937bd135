"""``seco demo``."""
