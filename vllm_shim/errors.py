"""What can go wrong inside an engine. vLLM shows the message as it stands, so it says what to do.

ShimError
├── ConfigurationError   a STEP_ORACLE_* variable that cannot be
├── NotSupported         a vLLM feature the shim does not emulate yet
├── OracleLost           the budget for reaching the oracle is spent, or the oracle refused this engine
└── InjectedError        a step that the experiment makes fail
"""


class ShimError(RuntimeError):
    """Root of the tree."""


class ConfigurationError(ShimError):
    """A STEP_ORACLE_* variable that cannot be."""


class NotSupported(ShimError):
    """A vLLM feature that is refused at start rather than emulated wrongly."""


class OracleLost(ShimError):
    """No answer will come; every pending step gets this error and the engine process ends."""


class InjectedError(ShimError):
    """A step that an overlay of the experiment makes fail; the engine ends as where a device fails."""
