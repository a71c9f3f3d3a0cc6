"""The supervisor's processes have the settings that it was given, whatever the caller's are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.devstack.supervisor import Supervisor
from pipeline.settings import PREFIX, load_settings


def test_no_setting_of_the_caller_or_of_a_file_reaches_a_process_in_place_of_the_supervisors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demo that took the caller's broker or address of Futwork would call people."""
    (tmp_path / ".env").write_text(f"{PREFIX}FUTWORK_BASE_URL=https://the.real.one/api\n")
    monkeypatch.setenv(PREFIX + "BROKER_URL", "redis://callers/0")
    monkeypatch.setenv(PREFIX + "FUTWORK_API_KEY", "callers")
    given = {"BROKER_URL": "redis://ours/0", "FUTWORK_BASE_URL": "http://ours/api", "FUTWORK_API_KEY": ""}
    with Supervisor(tmp_path / "logs", given) as supervisor:
        environment = supervisor.environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.broker_url == "redis://ours/0"
    assert settings.futwork_base_url == "http://ours/api"
    assert settings.api_keys() == {}
