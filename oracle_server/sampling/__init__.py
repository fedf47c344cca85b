"""Latency models compiled to flat arrays and numba kernels; pure functions of shape, key and step index.

Nothing is imported here, so that `buckets` and `grids` (numpy alone) load in the pack's checker without numba.
"""
