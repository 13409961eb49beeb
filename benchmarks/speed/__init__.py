"""Measures the cost of a request with each tool: `python -m benchmarks.speed`."""
