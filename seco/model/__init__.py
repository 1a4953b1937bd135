"""SeCo itself: encoder, heads, queue and the three losses (paper §4)."""
