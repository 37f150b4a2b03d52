"""What the kernels compute and cost on a GPU: `python -m benchmarks.gpu`."""
