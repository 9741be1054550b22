"""Usage events of one vault by their date, whatever other vaults call meanwhile.

The index of dates is everybody's: by it, one vault's last minutes are found among all that was called in them. By the
primary key they are found alone, where their ids were made when they were stored; what strayed further from its id than
that, such as a charge that was tried again for an hour, is found by an index of its own. No event is in both parts, and
none in neither.
"""

from typing import Final

from callora.store.reads.calls import least_id_sql

_SLACK: Final = "interval '11 seconds'"
"""A little more than what `has_strayed` lets pass, so that what is rounded here and there never falls between."""

EVENT_OF: Final = "(SELECT * FROM usage_events WHERE vault_id = v.vault_id AND event_id = {}.event_id OFFSET 0)"
"""One event of the vault, by its key: OFFSET 0 keeps the planner from beginning with all of the vault's."""


def of_each(vaults: str, statement: str) -> str:
    """Return the statement that looks at one vault after another.

    Args:
        vaults: the vaults, as a relation `v` with a column `vault_id`, and more where more is asked of each.
        statement: what is looked for in the vault `v.vault_id`.
    """
    return f"SELECT v.vault_id, found.* FROM {vaults}, LATERAL ({statement}) AS found"  # noqa: S608


def dated_events(columns: str, since: str, until: str | None = None) -> str:
    """Return the subquery of the events of the vault `v.vault_id` placed in [since, until).

    Args:
        columns: of usage_events, separated by commas.
        since: an instant in SQL, of this millennium; asked for several times.
        until: the same, or None for everything after.
    """
    least = least_id_sql(f"({since} - {_SLACK})")
    beyond = f"event_id < {least}"
    near, within = f"event_id >= {least}", f"created_at >= {since}"
    if until is not None:
        most = least_id_sql(f"({until} + {_SLACK})")
        beyond = f"({beyond} OR event_id >= {most})"
        near += f" AND event_id < {most}"
        within += f" AND created_at < {until}"
    return f"""(
        SELECT {columns} FROM usage_events WHERE vault_id = v.vault_id AND {near} AND {within}
        UNION ALL
        SELECT {columns} FROM usage_events
        WHERE vault_id = v.vault_id AND {within} AND has_strayed(event_id, created_at) AND {beyond}
    )"""  # noqa: S608 - names of ours
