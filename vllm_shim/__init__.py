"""The shim: our code inside an unmodified vLLM engine. It replaces the forward pass and nothing else.

Kept free of imports: vLLM loads the plugin module in every process it starts.
"""

__version__ = "0.1.0"
