"""The benchmark, which is no part of the package."""

import os
import sys
from importlib.util import find_spec

import click

from callora.cli.running import fail


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure every lane against nginx on this machine; needs a source checkout, wrk and nginx."""
    if find_spec("bench") is None:
        fail("callora bench: run it at the root of a source checkout, where the bench package is", 2)
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments])  # noqa: S606 - our own module
