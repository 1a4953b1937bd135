"""``seco report``: results compared with the paper's tables."""
