"""Tools that are not part of the paper: for data, weights and runs, and benchmarks."""
