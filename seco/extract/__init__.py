"""``seco extract-features``."""
