"""From raw videos to shards: one public file a dataset; machinery starts with ``_``."""
