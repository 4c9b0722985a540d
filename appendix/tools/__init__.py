"""What is no part of the paper: tools for data, weights and runs, and benchmarks."""
