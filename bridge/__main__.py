"""The command ``llama-bridge``, also where only the thin client is installed."""

from __future__ import annotations

import importlib
import os
import sys

OURS = ("protocol", "client", "bridge")


def main() -> None:
    """Runs the command line. Exits with 1 and what to do about it when the daemon's dependencies are missing."""
    try:
        from bridge.cli.lazy import COMPLETION
        from bridge.cli.main import cli

        if COMPLETION in os.environ:
            importlib.import_module("bridge.cli.completion")  # which knows bash better than click does
        cli(prog_name="llama-bridge")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OURS:
            raise
        print(
            f"llama-bridge: {missing} is not installed. This is the thin client; the command line and the daemon"
            " come with: pip install 'llama-bridge[daemon]'",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
