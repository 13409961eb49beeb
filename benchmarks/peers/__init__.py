"""One small application, written with each tool in that tool's own documented idiom."""
