"""What is in an adapted model: sparse deltas, bottlenecks, the layers that hold them, heads and norms."""
