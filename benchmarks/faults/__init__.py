"""Tests if a tool keeps its promises while its environment fails: `python -m benchmarks.faults`."""
