"""Entry points vLLM calls in each of its processes. Dormant unless STEP_ORACLE_TARGET is set."""

import os


def register() -> str | None:
    """Names our platform class, or None so that the same environment runs real vLLM.

    vLLM swallows what a platform plugin raises here (read in 0.18.1 to 0.33.0), so nothing is checked: the module of
    the
    class does that when vLLM imports it.
    """
    return "vllm_shim.platform.StepOraclePlatform" if os.environ.get("STEP_ORACLE_TARGET") else None


def verify_active() -> None:
    """Fails where STEP_ORACLE_TARGET is set but vLLM runs on another platform: it would be the real model.

    VLLM_TARGET_DEVICE=cpu bypasses platform plugins from 0.32.0 on (read).
    """
    if not os.environ.get("STEP_ORACLE_TARGET"):
        return
    from vllm.platforms import current_platform

    from vllm_shim.errors import ConfigurationError

    if type(current_platform).__name__ != "StepOraclePlatform":
        chosen = type(current_platform).__name__
        raise ConfigurationError(
            f"STEP_ORACLE_TARGET is set but vLLM chose the platform {chosen}, so the steps would not be "
            "emulated; unset VLLM_TARGET_DEVICE, let VLLM_PLUGINS contain step_oracle, run `step-oracle doctor`"
        )
