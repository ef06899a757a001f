"""The modules of an adapted model: sparse deltas, bottlenecks, SFA layers, heads and norms."""
