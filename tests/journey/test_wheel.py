"""The wheel in virtual environments of its own, outside the checkout: what it holds, and that everything runs from it.

The environments get their packages as links to those of this one, so that nothing is downloaded. They get only what the
wheel requires with some extras, so a package that nothing requires is missing there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import CAMPAIGN

ROOT = Path(__file__).parents[2]
NAME = "futwork-lead-pipeline"


class Installation:
    """A virtual environment that holds the wheel, some of its extras, and nothing else."""

    def __init__(self, folder: Path, wheel: Path, *extras: str) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        for name in _needs(extras):
            for part in {file.parts[0] for file in metadata.files(name) or () if file.parts[0] != ".."}:
                link, target = self.packages / part, Path(sysconfig.get_path("purelib")) / part
                if not link.exists() and part != "__pycache__":
                    link.symlink_to(target, target_is_directory=target.is_dir())
        install = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment's in *cwd*, with no variable of this one but the path."""
        environment = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(cwd), "TMPDIR": str(cwd)}
        return subprocess.run(
            [self.bin / command[0], *command[1:]], cwd=cwd, env=environment | variables, capture_output=True, text=True
        )

    def python(self, code: str, *, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-c", code, cwd=cwd, **variables)


def _needs(extras: tuple[str, ...]) -> set[str]:
    """Every package that the project with these extras requires, directly or through others."""
    found: set[str] = set()
    waiting = [(NAME, set(extras))]
    while waiting:
        name, wanted = waiting.pop()
        found.add(name)
        for need in map(Requirement, metadata.requires(name) or ()):
            if need.marker is not None and not any(need.marker.evaluate({"extra": one}) for one in {"", *wanted}):
                continue
            if need.name not in found or need.extras:
                waiting.append((need.name, need.extras))
    return found - {NAME}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("base") / "venv", wheel)


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("full") / "venv", wheel, "server", "cli", "embedded")


def test_it_installs_one_name_and_tells_type_checkers_that_it_has_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"pipeline"}
    assert "pipeline/py.typed" in names
    assert [name for name in names if "/migrations/versions/" in name]
    assert [name for name in names if "/templates/" in name]


def test_the_base_package_enqueues_without_the_packages_of_a_server(base: Installation, tmp_path, valkey_url, valkey):
    row = {"phone": "9999789877", "data": {}}
    code = f"from pipeline import enqueue; print(enqueue({CAMPAIGN!r}, [{row}]).accepted)"
    (tmp_path / "leads.csv").write_text("phone\n9999789878\n12\n")

    absent = base.python("import flask", cwd=tmp_path)
    done = base.python(code, cwd=tmp_path, BROKER_URL=valkey_url)
    command = base.run("pipeline", "enqueue", "leads.csv", "--campaign", CAMPAIGN, cwd=tmp_path, BROKER_URL=valkey_url)
    dry = base.run("pipeline", "enqueue", "leads.csv", "--campaign", CAMPAIGN, "--dry-run", cwd=tmp_path)

    assert "No module named 'flask'" in absent.stderr
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert (command.stdout.splitlines()[0], command.returncode) == (f"1 of 2 rows accepted for campaign {CAMPAIGN}", 1)
    assert (dry.stdout.splitlines()[0], dry.returncode) == (f"1 of 2 rows would be accepted for campaign {CAMPAIGN}", 1)
    assert valkey.llen("intake") == 2


def test_the_base_package_lists_the_commands_and_says_what_they_need(base: Installation, tmp_path):
    listed = base.run("pipeline", "--help", cwd=tmp_path)
    status = base.run("pipeline", "status", cwd=tmp_path)
    worker = base.run("python", "-m", "celery", "-A", "pipeline.worker", "worker", cwd=tmp_path)
    web = base.run("python", "-m", "pipeline.web", cwd=tmp_path)
    imported = base.python("import pipeline.ledger", cwd=tmp_path)

    assert (listed.returncode, listed.stderr) == (0, "")
    assert "Show the whole journey of one lead." in listed.stdout
    assert (status.returncode, status.stdout) == (2, "")
    assert status.stderr == f"pipeline: packages are missing: run `pip install '{NAME}[server,cli]'`\n"
    assert web.stderr == worker.stderr == f"pipeline: packages are missing: run `pip install '{NAME}[server]'`\n"
    assert imported.stderr.splitlines()[-1] == (
        f"pipeline.extras.MissingExtra: packages are missing: run `pip install '{NAME}[server]'`"
    )


def test_workers_web_and_the_command_run_from_it(full: Installation, tmp_path):
    """The demo starts two workers, beat and the web server; they import the code that the command imports."""
    (tmp_path / "worker.py").write_text("raise SystemExit('the file of another program')\n")

    done = full.run("pipeline", "demo", "--leads", "40", "--faults", "none", "--json", "--keep", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["accepted"], report["leads"]["called"], report["problems"]) == (39, 39, [])
    logs = {log.stem: log.read_text() for log in tmp_path.glob("pipeline-demo-*/logs/*.log")}
    assert {"dispatch", "records", "beat", "web", "sandbox"} <= set(logs)
    assert [name for name, log in logs.items() if str(ROOT) in log] == []
