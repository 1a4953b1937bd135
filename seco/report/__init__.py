"""``seco report``: results beside the paper's tables."""
