"""What is shipped beside the code: locks, image, Compose stack, dashboard, wheel."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from callora.config.loading import load_settings
from callora.config.settings import SETTINGS
from callora.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|_KEY$")
REQUIRED = re.compile(r"\$\{([A-Z_]+):\?[^}]+\}")


def pinned_names(lock: str) -> dict[str, str]:
    """Return the block of each package in a lock file, by name."""
    blocks = [block for block in re.split(r"\n(?=[a-zA-Z])", (ROOT / lock).read_text()) if block.strip()]
    named: dict[str, str] = {canonicalize_name(re.split(r"[=\s\[;]", block)[0]): block for block in blocks}
    assert len(named) == len(blocks), "a package is locked in two versions: one Python would run what another never saw"
    return named


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_host(lock: str) -> None:
    assert "://" not in (ROOT / lock).read_text()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_one_version_and_a_hash(lock: str) -> None:
    for name, block in pinned_names(lock).items():
        assert len(re.findall(r"==", block.splitlines()[0].split(";")[0])) == 1, name
        assert "--hash=sha256:" in block, name


def test_the_lock_covers_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    assert declared <= pinned_names("requirements.lock").keys()
    assert pinned_names("requirements.lock").keys() <= pinned_names("requirements-dev.lock").keys()


@pytest.mark.parametrize(("version", "suits"), [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_make_takes_a_python_that_the_project_declares_and_says_which_where_there_is_none(
    version: str, suits: bool, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(version) is suits
    major, minor = version.split(".")
    python = tmp_path / "python3"
    pretend = f"import sys; sys.version_info = ({major}, {minor}, 0); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    python.chmod(0o755)
    for each in ("Makefile", "requirements-dev.lock", "pyproject.toml", "tests/independent/package-lock.json"):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_bytes((ROOT / each).read_bytes())
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "dev", f"BIN={tmp_path}/none"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = "Callora needs Python 3.11, 3.12 or 3.13: make dev PYTHON=/path/to/python3.13"
    assert (told in done.stderr) is not suits
    assert ("python3 -m venv .venv" in done.stdout) is suits


# --- the image --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Instruction:
    """One instruction of a Dockerfile, its continuation lines joined."""

    verb: str
    text: str


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    """Return the Dockerfile's instructions."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Instruction(verb.upper(), text.strip()) for verb, text in pairs]


def last(dockerfile: list[Instruction], verb: str) -> str:
    """Return the text of the last instruction of a kind, which is the one that counts."""
    return [each.text for each in dockerfile if each.verb == verb][-1]


def test_base_images_are_tagged_and_never_latest(dockerfile: list[Instruction]) -> None:
    bases = [each.text.split()[0] for each in dockerfile if each.verb == "FROM"]
    assert bases
    for base in bases:
        assert re.fullmatch(r"[a-z/]+:[0-9][^ ]*", base), base
        assert "latest" not in base


def test_the_image_runs_as_an_account_without_rights(dockerfile: list[Instruction]) -> None:
    final = dockerfile[max(n for n, each in enumerate(dockerfile) if each.verb == "FROM") :]
    uid, gid = last(final, "USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    user = next(n for n, each in enumerate(final) if each.verb == "USER")
    assert not [each for each in final[user:] if each.verb in ("RUN", "COPY")], "nothing is installed as that account"


def test_the_entry_point_takes_sigterm_itself(dockerfile: list[Instruction]) -> None:
    assert json.loads(last(dockerfile, "ENTRYPOINT")) == ["callora"]
    assert json.loads(last(dockerfile, "CMD")) == ["serve"]
    assert last(dockerfile, "STOPSIGNAL") == "SIGTERM"


def test_nothing_is_added_from_an_address(dockerfile: list[Instruction]) -> None:
    assert not [each for each in dockerfile if each.verb == "ADD"]
    assert not [each for each in dockerfile if each.verb == "RUN" and re.search(r"curl|wget|://", each.text)]


def test_the_image_installs_only_what_is_hashed(dockerfile: list[Instruction]) -> None:
    commands = [part for each in dockerfile if each.verb == "RUN" for part in each.text.split("&&")]
    installs = [command for command in commands if "pip install" in command]
    assert len(installs) == 3
    assert all("--require-hashes" in command or "--no-index" in command for command in installs)
    assert any("requirements.lock" in command for command in installs)


def test_the_build_takes_exactly_the_build_backend_from_the_development_lock(dockerfile: list[Instruction]) -> None:
    command = next(each.text for each in dockerfile if "build.lock" in each.text)
    _, program, lock, *_ = shlex.split(command.partition(">")[0])
    taken = subprocess.run(["awk", program, lock], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = {"hatchling"}
    for each in map(Requirement, requires("hatchling") or []):
        if each.marker is None or each.marker.evaluate({"python_version": "3.11"}):
            needed.add(each.name)
    assert set(re.findall(r"^([a-z-]+)==", taken, re.MULTILINE)) == needed
    assert all(line.startswith((*needed, "    --hash=sha256:")) for line in taken.splitlines())


def test_everything_copied_into_the_image_exists(dockerfile: list[Instruction]) -> None:
    for each in dockerfile:
        if each.verb == "COPY" and "--from" not in each.text:
            *sources, _ = each.text.split()
            assert all((ROOT / source).exists() for source in sources), each.text


@pytest.fixture
def probed() -> Iterator[HTTPServer]:
    """Serve /livez with the status in the server's `status` attribute."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/livez" else 404)  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_checks_ask_livez(
    dockerfile: list[Instruction], compose: dict[str, Any], probed: HTTPServer, status: int, healthy: bool
) -> None:
    probed.status = status  # type: ignore[attr-defined]
    image = json.loads(last(dockerfile, "HEALTHCHECK").partition("CMD ")[2])
    stack = compose["services"]["callora"]["healthcheck"]["test"][1:]
    for command in (image, [part.replace("3000", str(probed.server_port)) for part in stack]):
        assert command[0] == "python"
        env = {**os.environ, "PORT": str(probed.server_port)}
        done = subprocess.run([sys.executable, *command[1:]], env=env, capture_output=True, check=False, timeout=20)
        assert (done.returncode == 0) == healthy, done.stderr


# --- the stack --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return the Compose file."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def test_every_service_has_a_tagged_image_a_restart_rule_and_a_health_check(compose: dict[str, Any]) -> None:
    assert {"callora", "postgres", "prometheus", "grafana"} <= compose["services"].keys()
    for name, service in compose["services"].items():
        tag = service["image"].partition(":")[2]
        assert re.match(r"v?[0-9]", tag), name
        assert "latest" not in tag, name
        assert "restart" in service, name
        ends = service["restart"] == "no"
        assert service["healthcheck"].get("disable", False) == ends, name
        if not ends:
            assert service["healthcheck"]["test"][0] == "CMD", "exec form, no shell"


def test_services_wait_for_what_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for needed, how in service.get("depends_on", {}).items():
            ends = compose["services"][needed]["restart"] == "no"
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")


def test_every_mounted_file_and_volume_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()


def test_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    secrets = 0
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name):
                assert REQUIRED.fullmatch(value), name
                secrets += 1
    assert secrets >= 6


def test_callora_has_longer_to_stop_than_its_drain_lasts(compose: dict[str, Any]) -> None:
    service = compose["services"]["callora"]
    assert service["stop_grace_period"] == "35s"
    assert load_settings(stack_environment(compose)).drain_timeout_seconds == 30


def test_the_stack_configures_callora_for_production(compose: dict[str, Any]) -> None:
    environ = stack_environment(compose)
    assert environ.keys() <= {name for setting in SETTINGS.values() for name in setting.names}
    settings = load_settings(environ)
    assert settings.is_production
    assert settings.database_dsn is not None
    assert "@postgres:5432/callora" in settings.database_dsn.get_secret_value()


def stack_environment(compose: dict[str, Any]) -> dict[str, str]:
    """Return what Callora finds in its environment, every required secret filled in."""
    environment = compose["services"]["callora"]["environment"]
    return {name: REQUIRED.sub(lambda found: found[1].lower() * 4, value) for name, value in environment.items()}


def test_prometheus_scrapes_callora_with_the_key_it_was_given(compose: dict[str, Any]) -> None:
    jobs = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    job = next(job for job in jobs if job["job_name"] == "callora")
    assert job["metrics_path"] == "/api/metrics"
    assert job["static_configs"] == [{"targets": ["callora:3000"]}]
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["services"]["prometheus"]["secrets"]
    assert compose["secrets"][secret] == {"environment": "METRICS_API_KEY"}


# --- the dashboard ----------------------------------------------------------------------------------------------------

SHOWN = {
    "callora_calls_total",
    "callora_refusals_total",
    "http_request_duration_seconds",
    "callora_charged_stroops_total",
    "callora_available_stroops",
    "callora_held_stroops",
    "callora_hold_oldest_seconds",
    "callora_ledger_drift_stroops",
    "callora_rounds_total",
    "callora_round_commands",
    "callora_inflight_calls",
    "callora_draining",
}
PROMQL_WORDS = {"sum", "max", "by", "le", "rate", "histogram_quantile"}


@pytest.fixture(scope="module")
def expressions() -> list[str]:
    """Return every query of the dashboard."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/callora.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_only_for_series_and_labels_that_exist(expressions: list[str]) -> None:
    families = {each.name: each for each in Metrics().described}
    shown = set()
    for expression in expressions:
        labels = set(re.findall(r"by \(([a-z_]+)\)", expression)) | set(re.findall(r'([a-z_]+)="', expression))
        bare = re.sub(r'\{[^}]*\}|\[[^]]*\]|by \([^)]*\)|"[^"]*"|1e7', "", expression)
        for word in set(re.findall(r"[a-z_]{3,}", bare)) - PROMQL_WORDS:
            family = families.get(word) or families[re.sub(r"_(bucket|sum|count)$", "", word)]
            assert (family.kind == "histogram") == (family.name != word), word
            assert labels <= {*family.labels, "le"}, expression
            shown.add(family.name)
    assert shown >= SHOWN


def test_every_panel_has_its_own_place_and_the_provisioned_source() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/callora.json").read_text())
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert all(target["datasource"]["uid"] == uid for target in panel["targets"])


def test_the_provisioned_folder_is_where_the_stack_mounts_the_dashboards(compose: dict[str, Any]) -> None:
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/callora.yml").read_text())["providers"][0]
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).relative_to(provider["options"]["path"])).exists()


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that holds the built wheel's contents."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True, timeout=100)
    (wheel,) = out.glob("callora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_the_wheel_holds_every_migration_unchanged(unpacked: Path) -> None:
    ours = {path.name: path.read_bytes() for path in (ROOT / "migrations").glob("*.sql")}
    assert ours
    assert {path.name: path.read_bytes() for path in (unpacked / "callora/_migrations").glob("*.sql")} == ours


def test_the_wheel_holds_callora_and_nothing_else(unpacked: Path) -> None:
    assert sorted(path.name.partition("-")[0] for path in unpacked.iterdir()) == ["callora", "callora"]
    sources = {path.relative_to(ROOT) for path in (ROOT / "callora").rglob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == sources


def test_every_module_of_the_wheel_imports_with_the_locked_dependencies_alone(unpacked: Path) -> None:
    program = """
import importlib, importlib.metadata, pkgutil, sys
unpacked, *absent = sys.argv[1:]
sys.path.insert(0, unpacked)
sys.modules.update(dict.fromkeys(absent))  # importing one of these is an ImportError from here on
import callora
assert callora.__file__.startswith(unpacked), callora.__file__
for module in pkgutil.walk_packages(callora.__path__, "callora."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
(distribution,) = importlib.metadata.distributions(name="callora", path=[unpacked])
(command,) = distribution.entry_points.select(group="console_scripts", name="callora")
assert callable(command.load())
"""
    image = pinned_names("requirements.lock").keys() | {"callora", "setuptools", "pip"}
    absent = [
        module
        for module, distributions in packages_distributions().items()
        if not {canonicalize_name(each) for each in distributions} & image
    ]
    assert {"psutil", "pytest", "hypothesis"} <= set(absent)
    argv = [sys.executable, "-c", program, str(unpacked), *absent]
    done = subprocess.run(argv, cwd=unpacked, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
