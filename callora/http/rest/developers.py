"""Developers: their profile."""

from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from callora.actors.publisher import Publisher
from callora.http.rest.api_forms import Name, ShortProse, WebUrl, require_a_field
from callora.http.rest.forms import Form, InstantOut, iso
from callora.http.rest.operations import Access, Answer, Ask, Routes
from callora.ledger.ids import UserId
from callora.store.reads import apis as reads

Category = Literal["analytics", "developer-tools", "finance", "payments", "security", "ai", "data", "productivity"]


class Profile(Form):
    """What a developer tells of himself."""

    id: str
    user_id: str
    name: str | None
    website: str | None
    description: str | None
    category: str | None
    created_at: InstantOut
    updated_at: InstantOut


class ProfileChange(Form):
    """What to change; null clears, what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    name: Name | None = None
    website: WebUrl | None = None
    description: ShortProse | None = None
    category: Category | None = None

    @model_validator(mode="after")
    def _something(self) -> "ProfileChange":
        require_a_field(self)
        return self


def developer_routes(publisher: Publisher, database: reads.Database) -> Routes:
    """Return the routes of the profile."""
    routes = Routes("Developers")

    async def shown(user_id: UserId) -> Answer:
        row = await reads.profile(database, user_id)
        assert row is not None
        times = {name: iso(row[name]) for name in ("created_at", "updated_at")}
        return Answer(Profile(**{**dict(row), **times}))

    @routes.add(
        "GET",
        "/api/developers/me",
        access=Access.USER,
        answers={200: Profile},
        problems=("OUTCOME_UNKNOWN",),
    )
    async def get_profile(ask: Ask[Any, Any, Any]) -> Answer:
        """Your profile as a developer, blank at first."""
        user_id = UserId(ask.user_id)
        await publisher.ensure_profile(user_id)
        return await shown(user_id)

    @routes.add(
        "PATCH",
        "/api/developers/me",
        access=Access.USER,
        body=ProfileChange,
        answers={200: Profile},
        problems=("OUTCOME_UNKNOWN",),
    )
    async def change_profile(ask: Ask[Any, Any, ProfileChange]) -> Answer:
        """Change your profile; null clears a field."""
        user_id = UserId(ask.user_id)
        changes = {name: getattr(ask.body, name) for name in ask.body.model_fields_set}
        await publisher.change_profile(user_id, changes)
        return await shown(user_id)

    return routes
