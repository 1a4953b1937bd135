"""``seco inspect``: what shards hold."""
