"""SeCo: encoder, losses, training and evaluation (Yao et al., AAAI 2021)."""

__version__ = "0.1.0"
