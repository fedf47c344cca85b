"""The command `step-oracle`: dispatch first, imports as late as they can be.

`doctor`, `health` and `vllm-install` run before anything beyond the standard library is imported, since the
environments they look at or build need not have it; `capture` runs beside a vLLM that has the core distribution alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

_STANDARD_LIBRARY_COMMANDS = ("doctor", "health", "vllm-install", "capture")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 done, 1 refused by the facts, 2 wrong arguments, 3 no server."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _STANDARD_LIBRARY_COMMANDS:
        return standard_library_main(arguments[0], arguments[1:])
    try:
        import typer
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(
            "step-oracle: this command needs an extra that is not installed: pip install 'step-oracle[server]'",
            file=sys.stderr,
        )
        return 2
    from oracle_server.errors import InvalidArgument, OracleError, PackInvalid

    command = typer.main.get_command(build_app())
    try:
        command(args=arguments, prog_name="step-oracle")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except PackInvalid as error:
        print(f"step-oracle: {f'{error.where}: ' if error.where else ''}{error.message}", file=sys.stderr)
        return 1
    except OracleError as error:
        print(f"step-oracle: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    except BrokenPipeError:
        # The reader of our output left, for example `head`.
        sys.stderr.close()
        return 1
    return 0


def build_app() -> typer.Typer:
    """The server's commands and the profiler's in one tree; groups of the same name become one."""
    import typer

    from oracle_server.cli import app as server
    from profiler.commands import PARTS

    root = typer.Typer(
        name="step-oracle",
        help="Runs a fleet of real vLLM engines with no GPU: one server answers how long every step takes.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # rich takes 90 ms to import, the plain help none
        pretty_exceptions_enable=False,
    )
    groups: dict[str, typer.Typer] = {}
    for part in (server, *PARTS):
        root.registered_commands.extend(part.registered_commands)
        for info in part.registered_groups:
            instance = info.typer_instance
            if instance is None:
                continue
            name = str(info.name or instance.info.name)
            if name not in groups:
                text = info.help if isinstance(info.help, str) else instance.info.help
                groups[name] = typer.Typer(
                    name=name, help=text if isinstance(text, str) else None, no_args_is_help=True, rich_markup_mode=None
                )
                root.add_typer(groups[name])
            groups[name].registered_commands.extend(instance.registered_commands)
            groups[name].registered_groups.extend(instance.registered_groups)
    return root


def standard_library_main(name: str, arguments: list[str]) -> int:
    """Runs `doctor`, `health`, `vllm-install` or `capture`."""
    if name == "doctor":
        from oracle_server import doctor

        return doctor.main(arguments)
    if name == "health":
        from oracle_server import health

        return health.main(arguments)
    if name == "capture":
        from profiler.capture import command

        return command.main(arguments)
    from oracle_server import vllm_install

    return vllm_install.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
