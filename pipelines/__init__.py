"""From raw videos to shards: one public file per dataset; machinery starts with ``_``."""
