"""``seco finetune`` and ``seco finetune-eval``."""
