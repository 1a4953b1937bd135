"""The shard format: writing, indexing, reading, the epoch order and the triplet stream."""
