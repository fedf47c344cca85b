"""`step-oracle vllm-check`: whether shim, replay and capture fit a vLLM release, read from its source (README.md)."""
