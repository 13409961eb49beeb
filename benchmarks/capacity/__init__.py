"""How many connections an application needs, simulated: `python -m benchmarks.capacity`."""
