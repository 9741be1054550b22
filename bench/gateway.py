"""A gateway that stops short of the ledger, to measure what each part costs: the service itself with a shorter flow.

`python -m bench.gateway proxy|limits` takes the same environment as `callora serve`.
"""

import os
import signal
import sys
from typing import Final

import trio

import callora.__main__  # noqa: F401 - garbage is collected as the service has it collected
from callora.config.loading import load_settings
from callora.http.gateway.admission import Caller, Offer, Upstream
from callora.http.gateway.calls import Call, CallFlow
from callora.ledger.commands import IdempotencyClaim
from callora.logs import Logs
from callora.service import Context, SystemClock, serve


class LimitsOnly(CallFlow):
    """Key, rights and limits, but no ledger."""

    async def hold(
        self,
        call: Call,
        caller: Caller,
        offer: Offer,
        upstream: Upstream,
        whole_body: bytes,
        claim: IdempotencyClaim | None,
    ) -> bool:
        """Proxy without holding anything."""
        return await self.proxy(call, offer, upstream, whole_body, claim)


class ProxyOnly(CallFlow):
    """No key, no limits, no ledger."""

    async def admit(self, call: Call) -> bool:
        """Proxy whatever resolves to an API."""
        now = trio.current_time()
        offer = call.offer = await self._admission.resolve(call.request, now, self._clock.now())
        return await self.proxy(call, offer, await self._admission.upstream(offer.api, now), b"", None)


LANES: Final[dict[str, type[CallFlow]]] = {"proxy": ProxyOnly, "limits": LimitsOnly, "paid": CallFlow}


async def _main(lane: str) -> int:
    settings = load_settings(os.environ)
    assert settings.database_dsn is not None
    clock = SystemClock()
    with Logs(clock, level=settings.log_level, as_json=False) as logs:
        logs.capture_structlog()
        context = Context.make(settings, logs, clock)
        stop = trio.Event()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:

                async def listen() -> None:
                    async for _ in signals:
                        stop.set()

                nursery.start_soon(listen)
                code = await serve(context, settings.database_dsn.get_secret_value(), stop, flow_class=LANES[lane])
                nursery.cancel_scope.cancel()
    return code


if __name__ == "__main__":
    sys.exit(trio.run(_main, sys.argv[1]))
