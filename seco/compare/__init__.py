"""``seco compare``."""
