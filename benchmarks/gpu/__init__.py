"""The parts of ``benchmarks/gpu.sh``: each prints its table as it measures."""
