"""Where the web server listens: `HOST` as people write it."""

from __future__ import annotations

import pytest

from pipeline.web.__main__ import _address


@pytest.mark.parametrize(
    ("host", "address"),
    [("::", "::"), ("[::]", "::"), ("[::1]", "::1"), ("127.0.0.1", "127.0.0.1"), (" 0.0.0.0 ", "0.0.0.0")],
)
def test_an_ip_address_may_have_its_brackets(host: str, address: str) -> None:
    assert _address(host, 8000) == address


@pytest.mark.parametrize("host", ["no host", "[::1]:8000", "x" * 300])
def test_what_is_no_host_is_one_line_that_names_the_variable(host: str) -> None:
    with pytest.raises(SystemExit, match="pipeline: HOST and PORT: nothing can listen on "):
        _address(host, 8000)
