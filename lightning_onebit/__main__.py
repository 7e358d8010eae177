"""``python -m lightning_onebit doctor``."""

from __future__ import annotations

import sys

from lightning_onebit.doctor.command import main as doctor

USAGE = "usage: python -m lightning_onebit doctor [--help]\n"


def main() -> int:
    """Run the command that the first argument names; the exit code."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "doctor":
        return doctor(arguments)
    (sys.stdout if command in ("-h", "--help") else sys.stderr).write(USAGE)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
