"""Fast-forward replay: the real vLLM scheduler on a virtual clock, one process, no sleeping (README.md)."""
