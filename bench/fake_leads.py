"""Leads of the bench: as many people as wanted, each with a number of their own and data of a usual size."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("Asha Rao", "Vikram Shah", "Meera Iyer", "Arjun Nair", "Priya Das", "Rohan Mehta", "Kavya Menon")
_PLACES = ("Pune", "Kochi", "Jaipur", "Indore", "Nagpur")


def rows(number: int, *, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows as a backend hands them to `enqueue`."""
    for place in range(start, start + number):
        yield {
            "phone": f"98{place:08d}",
            "data": {
                "customer_name": _NAMES[place % len(_NAMES)],
                "place": _PLACES[place % len(_PLACES)],
                "product": "home loan",
                "crm_id": f"C-{place:08d}",
            },
        }


def write_csv(path: Path, number: int) -> None:
    """The same people as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phone", "customer_name", "place", "product", "crm_id"])
        writer.writerows((row["phone"], *row["data"].values()) for row in rows(number))
