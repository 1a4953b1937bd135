"""``seco retrieve``: nearest videos, indexes, near-duplicates."""
