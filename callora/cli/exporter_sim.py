"""A reference exporter with made-up counters, for whoever collects them."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import trio

from callora.cli.running import Stop, run_and_exit, run_until_stopped
from callora.service import SystemClock


def _one_in(name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.IntRange(0), default=0, show_default=True, help=f"One snapshot in N {what}.")


@click.command(name="exporter-sim")
@click.option("--port", type=click.IntRange(0, 65535), default=8082, show_default=True, help="0: the system chooses.")
@click.option("--token", envvar="EXPORTER_SIM_TOKEN", required=True, help="What readers present as a Bearer token.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same counters.")
@click.option("--node-id", default="sim-1", show_default=True)
@click.option("--env", default="dev", show_default=True)
@click.option("--subjects", type=click.IntRange(1, 100_000), default=10, show_default=True)
@click.option(
    "--interval", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds between snapshots."
)
@click.option(
    "--minutes", type=click.IntRange(0), default=10, show_default=True, help="How long ago its counters were 0."
)
@_one_in("--resets", "finds a subject's counters begun anew")
@_one_in("--restarts", "finds all counters begun anew")
@_one_in("--gaps", "is never taken")
@_one_in("--late", "is seen three intervals late")
@_one_in("--duplicates", "comes twice")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def exporter_sim(port: int, token: str, interval: float, minutes: int, as_json: bool, **plan_fields: Any) -> None:
    """Serve a reference exporter on this machine: made-up counters to collect, and at /truth what they come to."""
    from callora.demo_upstream import serve_demo_upstream
    from callora.exporter_sim import SimNode, SimPlan, make_exporter, whole_minutes_ago

    clock = SystemClock()
    plan = SimPlan(began_at=whole_minutes_ago(clock.now(), minutes), interval_seconds=interval, **plan_fields)

    async def run() -> int:
        async def main(stop: Stop) -> int:
            async with trio.open_nursery() as nursery:
                make_app = partial(make_exporter, plan, clock, token)
                url = await nursery.start(partial(serve_demo_upstream, make_app=make_app, port=port))
                subjects = SimNode(plan).subjects
                facts = {"url": url, "node_id": plan.node_id, "env": plan.env, "subjects": subjects}
                click.echo(
                    json.dumps(facts) if as_json else f"{plan.node_id} ({plan.env}) at {url}\n" + "\n".join(subjects)
                )
                await stop.as_drain().wait()
                nursery.cancel_scope.cancel()
            return 0

        return await run_until_stopped(main)

    run_and_exit(run)
