"""The `callora` command with all others under it."""

import click

from callora.cli.bench import bench
from callora.cli.counter import depositors, withdrawals
from callora.cli.dev import dev, sandbox
from callora.cli.doctor import doctor
from callora.cli.exporter_sim import exporter_sim
from callora.cli.keys import keys
from callora.cli.serve import migrate, serve_command
from callora.cli.settlements import reconcile, settle, settlements
from callora.cli.sums import revenue, rollup


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Callora: prepaid, pay-per-call API access. Every setting is an environment variable (docs/configuration.md)."""


for _command in (
    serve_command,
    dev,
    sandbox,
    exporter_sim,
    migrate,
    keys,
    depositors,
    withdrawals,
    settle,
    rollup,
    settlements,
    revenue,
    reconcile,
    doctor,
    bench,
):
    main.add_command(_command)
