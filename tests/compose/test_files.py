"""The files of the compose deployment, checked without an engine, so that `make test` runs these tests.

test_containers.py and test_story.py need an engine.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.compose import preflight

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
DOCKERFILE = DEPLOY / "Dockerfile"
ENTRYPOINT, HEALTHCHECK = DEPLOY / "docker/entrypoint.py", DEPLOY / "docker/healthcheck.py"
ONLY_NEWER_COMPOSE = (
    r"^(name|include):|\b(start_interval|pull_policy|develop|attach|additional_contexts|!reset|!override)\b|^ +content:"
)
FIXED_IDENTITY = r"\b(container_name|hostname|ipv4_address):"
TIMEOUT_S = 30


def lines_of(path: Path) -> list[str]:
    """Return the lines that are not comments."""
    return [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with only PATH and the given variables in its environment."""
    variables = {"PATH": os.environ.get("PATH", os.defpath), **(environment or {})}
    return subprocess.run([*command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=variables)


def test_the_dockerfile_builds_with_the_classic_builder() -> None:
    """It has no instruction that only BuildKit supports, and both stages use the base given as an argument."""
    text = DOCKERFILE.read_text()
    assert not re.search(
        r"^#\s*syntax\s*=|<<-?\s*['\"]?\w+|--(mount|chmod|link|parents|exclude|network|security)\b", text, re.M | re.I
    )
    code = "\n".join(lines_of(DOCKERFILE))
    assert re.findall(r"^FROM (\S+)", code, re.M) == ["${BASE}", "${BASE}"]
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", code, re.M)


def test_the_image_runs_as_a_user_and_takes_signals() -> None:
    """It has a numeric user, exec forms, a health check, and the version of the package."""
    code = "\n".join(lines_of(DOCKERFILE))
    assert re.findall(r"^USER (\S+)$", code, re.M) == ["10001:10001"]
    for instruction in ("ENTRYPOINT", "CMD"):
        assert re.search(rf'^{instruction} \["', code, re.M)
    assert re.search(r'^HEALTHCHECK .*\\\n +CMD \["', code, re.M)
    assert re.search(rf"^ARG VERSION={re.escape(str(project()['version']))}$", code, re.M)
    assert f"image: ${{TABLEWIRE_IMAGE:-tablewire:{project()['version']}}}" in COMPOSE.read_text()


def test_the_image_leaves_out_exactly_the_local_servers() -> None:
    """The Dockerfile removes exactly the packages of the extra `local` from the lock file."""
    (dropped,) = re.findall(r"!/\^\(([a-z|-]+)\)==/", DOCKERFILE.read_text())
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    assert set(dropped.split("|")) == {re.split(r"[>=; ]", line)[0] for line in extras["local"]}


def test_a_build_sees_only_what_it_copies() -> None:
    """.dockerignore admits exactly what the Dockerfile copies: no tests, no secrets, no history."""
    rules = lines_of(ROOT / ".dockerignore")
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [line.split()[1:-1] for line in lines_of(DOCKERFILE) if line.startswith("COPY") and "--from" not in line]
    assert allowed == {name.rstrip("/") for names in copied for name in names}


def test_the_file_suits_both_compose_versions() -> None:
    """It has nothing that docker-compose 1.29 or compose v2 does not support, and the `version` that 1.29 requires."""
    text = "\n".join(lines_of(COMPOSE))
    assert not re.findall(ONLY_NEWER_COMPOSE, text, re.M)
    assert re.search(r'^version: "3\.\d"$', text, re.M)


def test_services_that_scale_have_no_fixed_identity() -> None:
    """No service has a fixed name or address; only Prometheus and Grafana publish ports, on the loopback interface."""
    text = "\n".join(lines_of(COMPOSE))
    assert not re.findall(FIXED_IDENTITY, text)
    published = re.findall(r"^ +- (\S*:\d+)$", text.replace('"', ""), re.M)
    assert [port.rpartition(":")[2] for port in published] == ["9090", "3000"]
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned_by_exact_tag() -> None:
    """Every image has a full version; none uses `latest` or a digest."""
    images = re.findall(r"image: \$\{\w+:-([^}]+)\}$", COMPOSE.read_text(), re.M)
    assert len(images) == 5
    assert len(re.findall(r"^ +image:", COMPOSE.read_text(), re.M)) == len(images)
    assert not [image for image in images if not re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z]+)?$", image) or "@" in image]


def test_no_secret_is_in_the_files() -> None:
    """Passwords come from files that git ignores; the examples have no values."""
    for path in [COMPOSE, DOCKERFILE, *DEPLOY.joinpath("compose").rglob("*")]:
        if path.is_file() and path.suffix != ".env":
            values = re.findall(
                r"(?i)\w*(?:password|secret|token)\w*\s*[=:](?!-compose/secrets})[ \t]*(\S*)", "\n".join(lines_of(path))
            )
            assert not [
                value
                for value in values
                if value.strip("'\";") not in ("", "tablewire", "password") and "$" not in value and "%s" not in value
            ]
    assert set(re.findall(r"env_file: (\S+)/\w+\.env$", COMPOSE.read_text(), re.M)) == {"${SECRETS_DIR:-compose/secrets}"}
    assert "*.env" in lines_of(DEPLOY / "compose/secrets/.gitignore")
    named = set(re.findall(r"env_file: \S+/(\w+)\.env$", COMPOSE.read_text(), re.M))
    assert {path.name.partition(".")[0] for path in DEPLOY.glob("compose/secrets/*.example")} == named


def test_every_variable_of_the_file_is_in_the_example() -> None:
    """deploy/compose/env.example lists exactly the variables of the file, with the same defaults."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text()))
    shown = dict(re.findall(r"^#(\w+)=(.*)$", (DEPLOY / "compose/env.example").read_text(), re.M))
    assert shown == used


def test_secrets_are_created_once(tmp_path: Path) -> None:
    """make-secrets.sh writes what compose.yaml reads, private and with random passwords; a second run changes nothing."""
    script = DEPLOY / "compose/make-secrets.sh"
    assert run(script, tmp_path).returncode == 0
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    examples = {path.name.removesuffix(".example"): path.read_text() for path in DEPLOY.glob("compose/secrets/*.example")}
    keys = {name: re.findall(r"^(\w+)=", text, re.M) for name, text in examples.items()}
    assert {name: re.findall(r"^(\w+)=[0-9a-f]{48}$", text, re.M) for name, text in made.items()} == keys
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    values = dict(re.findall(r"^(\w+)=(\w+)$", made["services.env"], re.M))
    assert f"TABLEWIRE_PASSWORD={values['SOURCE_PASSWORD']}\n" in made["source.env"]
    assert f"TABLEWIRE_PASSWORD={values['SINK_PASSWORD']}\n" in made["sink.env"]
    assert len({value for text in made.values() for value in re.findall(r"=(\w+)$", text, re.M)}) == 5
    assert run(script, tmp_path).returncode == 0
    assert made == {path.name: path.read_text() for path in tmp_path.iterdir()}


def test_the_entry_point_puts_the_host_name_into_addresses() -> None:
    """It replaces the host name only in TABLEWIRE_*__ADVERTISE; all other variables are unchanged."""
    with_addresses = runpy.run_path(str(ENTRYPOINT))["with_addresses"]
    given = {"TABLEWIRE_ADMIN__ADVERTISE": "{hostname}:7440", "TABLEWIRE_CLUSTER": "{hostname}", "ADVERTISE": "{hostname}"}
    assert with_addresses(given, "abc") == {**given, "TABLEWIRE_ADMIN__ADVERTISE": "abc:7440"}


@pytest.mark.parametrize(("command", "code", "text"), [([], 2, "no command"), (["no-such-program"], 127, "no-such-program: ")])
def test_the_entry_point_reports_what_it_cannot_run(command: list[str], code: int, text: str) -> None:
    """It prints one line and uses the exit code of a shell."""
    done = run(sys.executable, "-I", ENTRYPOINT, *command)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert text in done.stderr


def test_the_entry_point_becomes_the_command() -> None:
    """The command runs in the same process with its arguments and variables."""
    script = "import os, sys; print(os.getpid(), os.environ['TABLEWIRE_EXCHANGE__ADVERTISE'], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-I", ENTRYPOINT, sys.executable, "-c", script, "one", "two"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ.get("PATH", os.defpath), "TABLEWIRE_EXCHANGE__ADVERTISE": "{hostname}:7450"},
    ) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert output.split()[0] == str(process.pid)
    assert re.search(r" [^{} ]+:7450 \['one', 'two'\]$", output.strip())


@pytest.mark.parametrize(("path", "code", "text"), [("/readyz", 1, "not registered"), ("/healthz", 0, "ok")])
def test_the_health_check_asks_the_http_port(path: str, code: int, text: str) -> None:
    """Exit code 0 if the service responds with 200, else 1 with its reason."""

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthz" else 503)
            self.end_headers()
            self.wfile.write(b"ok\n" if self.path == "/healthz" else b"not registered\n")

        def log_message(self, format: str, *args: object) -> None:
            """Suppress the log."""

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = {"TABLEWIRE_HTTP__PORT": str(server.server_address[1])}
            done = run(sys.executable, "-I", HEALTHCHECK, path, environment=port)
        finally:
            server.shutdown()
            thread.join()
    assert (done.returncode, done.stdout.strip()) == (code, text)


def test_the_health_check_reports_an_unreachable_service(free_port: int) -> None:
    """Exit code 1 with the port and without a traceback."""
    done = run(sys.executable, "-I", HEALTHCHECK, environment={"TABLEWIRE_HTTP__PORT": str(free_port)})
    assert (done.returncode, done.stderr) == (1, "")
    assert f"port {free_port}" in done.stdout


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the programs, one line names them and the command that installs them."""
    monkeypatch.setattr(preflight, "search_path", lambda: "/nonexistent")
    problem = preflight.trouble()
    assert "\n" not in problem
    assert "no dockerd, containerd, runc, docker, docker-compose, iptables, debootstrap" in problem
    assert problem.endswith("apt-get install containerd debootstrap docker-compose docker.io iptables runc")
