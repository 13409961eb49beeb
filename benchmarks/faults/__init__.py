"""Whether a tool keeps its word while everything around it fails: `python -m benchmarks.faults`."""
