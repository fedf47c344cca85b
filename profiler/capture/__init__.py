"""Captures real engines: what each step was, how long the device was busy with it, and the facts a pack needs.

`scheduler`, `worker`, `facts`, `device_times`, `pause` and `trace_file` run inside the engine and import the standard
library, protobuf, vLLM and `vllm_shim.step_shape` alone. The others read what they wrote.
"""

from profiler.capture.launch import capture_arguments, capture_command
from profiler.capture.pause import pause, paused, resume

__all__ = ["capture_arguments", "capture_command", "pause", "paused", "resume"]
