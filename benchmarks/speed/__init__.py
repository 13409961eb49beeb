"""What a request costs with each tool, and what it holds: `python -m benchmarks.speed`."""
