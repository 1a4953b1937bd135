"""The processes of a run: devices, ranks, launching, stopping."""
