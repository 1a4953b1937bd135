"""Loader processes and the batches they make."""
