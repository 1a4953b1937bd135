"""``seco pretrain``."""
