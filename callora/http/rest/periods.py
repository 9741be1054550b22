"""Periods of usage: what a request may ask for, and how sums over one are shown."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol

import attrs
from pydantic import ConfigDict, Field

from callora.http.rest.forms import Form, Instant, InstantOut, UsdcOut, invalid, iso, usdc
from callora.store.reads.usage import Unit

MINUTE: Final = timedelta(minutes=1)
DAY: Final = timedelta(days=1)
PERIOD_MAX: Final = timedelta(days=366)
HOURLY_MAX: Final = timedelta(days=2)
"""The longest period that is shown by the hour: hours are added up from minutes."""
EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)

GroupBy = Literal["hour", "day", "week", "month"]


class PeriodQuery(Form):
    """A period, by default one that ends now."""

    model_config = ConfigDict(populate_by_name=False)  # `from_` is no name of a parameter

    from_: Instant | None = Field(default=None, alias="from", description="Taken down to a whole minute.")
    to: Instant | None = Field(
        default=None, description="Not part of the period; taken up to a whole minute, and to now at most."
    )


class Period(Form):
    """A period as it was used."""

    from_: InstantOut = Field(alias="from")
    to: InstantOut


class Asked(Protocol):
    """What asks for a period."""

    @property
    def from_(self) -> datetime | None:
        """Its first instant."""

    @property
    def to(self) -> datetime | None:
        """The instant after it."""


@attrs.frozen
class Span:
    """A period of whole minutes."""

    since: datetime
    until: datetime

    @property
    def shown(self) -> Period:
        """The period for an answer."""
        return Period.model_validate({"from": iso(self.since), "to": iso(self.until)})

    def whole_days(self) -> "Span":
        """Return the days in UTC that the period touches."""
        last = day_of(self.until)
        return Span(day_of(self.since), last if last == self.until else last + DAY)

    def buckets(self, unit: Unit) -> Iterator[datetime]:
        """Yield the first instant of every bucket that the period touches."""
        at = bucket_of(self.since, unit)
        while at < self.until:
            yield at
            at = bucket_of(at + timedelta(days=32), unit) if unit == "month" else at + _STEPS[unit]


_STEPS: Final[Mapping[str, timedelta]] = {"hour": timedelta(hours=1), "day": DAY, "week": 7 * DAY}


def day_of(moment: datetime) -> datetime:
    """Return the first instant of its day in UTC."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def bucket_of(moment: datetime, unit: Unit) -> datetime:
    """Return the first instant of the bucket; weeks begin on Monday."""
    if unit == "hour":
        return moment.replace(minute=0, second=0, microsecond=0)
    day = day_of(moment)
    if unit == "week":
        return day - day.weekday() * DAY
    return day.replace(day=1) if unit == "month" else day


def span_of(asked: Asked, now: datetime, default: timedelta, unit: Unit = "day") -> Span:
    """Return the period that a query asks for.

    Args:
        default: how long it is where `from` is missing.
        unit: what it is shown by.

    Raises:
        ProblemRaised: VALIDATION_ERROR for `query.from`.
    """
    until = now.replace(second=0, microsecond=0) + MINUTE
    if asked.to is not None and asked.to < until:
        until = max(EARLIEST, asked.to.replace(second=0, microsecond=0))
        until += MINUTE if asked.to > until else timedelta()
    since = (asked.from_ or until - default).replace(second=0, microsecond=0)
    if since > until:
        raise invalid("query.from", "Must not be later than `to`, nor in the future", "TOO_LARGE")
    if since < EARLIEST - PERIOD_MAX:
        raise invalid("query.from", "Must not be before the year 2000", "TOO_SMALL")
    if until - since > PERIOD_MAX:
        raise invalid("query.from", "Must be at most 366 days before `to`", "TOO_SMALL")
    if unit == "hour" and until - since > HOURLY_MAX:
        raise invalid("query.from", "Must be at most 2 days before `to` where groupBy is hour", "TOO_SMALL")
    return Span(since, until)


# --- sums -------------------------------------------------------------------------------------------------------------

AS_OF: Final = "Calls and refunds until then are in the sums; usually seconds ago. Null before anything was added up."
REVENUE: Final = "What was charged, less what was refunded in the same time."


class Bucket(Form):
    """A stretch of time; those without a call are shown as well."""

    period: InstantOut = Field(description="Its first instant in UTC; a week begins on Monday.")
    hour: InstantOut | None = Field(description="The same where groupBy is hour, else null.")
    calls: int
    failedCalls: int
    revenue: UsdcOut = Field(description=REVENUE)
    refunded_usdc: UsdcOut


class EndpointRef(Form):
    """An endpoint."""

    id: int
    method: str | None = Field(description="`*` is any method; null for an endpoint that is not known any more.")
    path: str | None


def endpoint_of(row: Mapping[str, Any]) -> EndpointRef:
    """Return the endpoint that a row names."""
    return EndpointRef(id=row["endpoint_id"], method=row["method"], path=row["path"])


def shown_as_of(as_of: datetime) -> InstantOut | None:
    """Return how far sums reach, for an answer."""
    return iso(as_of) if as_of >= EARLIEST else None


def filled(span: Span, unit: Unit, rows: Mapping[datetime, Mapping[str, Any]]) -> list[Bucket]:
    """Return every bucket of a period, with what is known of it."""
    return [bucket(at, unit, rows.get(at)) for at in span.buckets(unit)]


def bucket(at: datetime, unit: Unit, row: Mapping[str, Any] | None) -> Bucket:
    """Return one bucket; without a row nothing happened in it."""
    return Bucket(
        period=iso(at),
        hour=iso(at) if unit == "hour" else None,
        calls=row["calls"] if row else 0,
        failedCalls=row["failed_calls"] if row else 0,
        revenue=usdc(net(row) if row else 0),
        refunded_usdc=usdc(row["refunded"] if row else 0),
    )


def net(row: Mapping[str, Any]) -> int:
    """Return what was charged less what was refunded, stroops of either sign."""
    charged: int = row["amount"]
    refunded: int = row["refunded"]
    return charged - refunded


def average_ms(row: Mapping[str, Any]) -> int | None:
    """Return the mean latency of the calls that have one, rounded."""
    return round(row["latency_us"] / row["timed_calls"] / 1000) if row["timed_calls"] else None


def success_rate(row: Mapping[str, Any]) -> float | None:
    """Return the share of calls that went well, in per cent with two places."""
    return round(100 * (row["calls"] - row["failed_calls"]) / row["calls"], 2) if row["calls"] else None
