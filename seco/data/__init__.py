"""Views, clips, pairs and frames from shards."""
