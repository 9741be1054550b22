"""The whole OpenAPI document against the whole service, by generated requests, fitting and not."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.http.test_route_matrix import ENVIRON
from tests.support.rest import ADMIN_KEY, rest_client
from tests.support.service import running_service
from tests.support.wallets import Wallet

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)


@pytest.mark.parametrize("asker", ["person", "operator"])
@pytest.mark.parametrize(
    "extent",
    [
        # The slice asks the same of every tree; the long run looks further each time and prints its seed.
        ("--phases", "examples,fuzzing", "--max-examples", "3", "--generation-deterministic"),
        pytest.param(("--phases", "examples,coverage,fuzzing", "--max-examples", "60"), marks=pytest.mark.proof),
    ],
    ids=["slice", "proof"],
)
@pytest.mark.timeout(1800)
async def test_every_answer_is_one_that_the_document_shows(
    database_url: str, tmp_path: Path, asker: str, extent: tuple[str, ...]
) -> None:
    async with running_service(database_url, ENVIRON) as service, rest_client(service) as client:
        someone = await Wallet().log_in(client)
        credentials = {
            "person": f"Authorization: Bearer {someone.access_token}",
            "operator": f"X-Admin-Api-Key: {ADMIN_KEY}",
        }
        theirs = "--exclude-path-regex" if asker == "person" else "--include-path-regex"
        done = await trio.run_process(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/api/openapi.json"),
                *("--header", credentials[asker], "--checks", ",".join(CHECKS), *extent),
                *("--continue-on-failure", "--no-color", "--suppress-health-check", "all", "--request-timeout", "60"),
                # The person must not end his own session: all the rest would be refused with it.
                *(
                    theirs,
                    "^/api/admin|/refund$" + ("|/revoke-all$|/sessions/|^/api-keys" if asker == "person" else ""),
                ),
            ],
            cwd=tmp_path,
            check=False,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, done.stdout.decode()[-12000:]
