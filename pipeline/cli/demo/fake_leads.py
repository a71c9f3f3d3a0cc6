"""Made-up leads for the demo: names, places and numbers that belong to nobody, with a few rows that cannot be leads."""

from __future__ import annotations

import csv
import random
from pathlib import Path

_NAMES = [
    "Asha", "Vikram", "Priya", "Rahul", "Meera", "Arjun", "Kavya", "Rohan", "Divya", "Imran", "Sunita", "Farhan",
    "Ananya", "Joseph", "Lakshmi", "Deepak",
]  # fmt: skip
_FAMILIES = [
    "Sharma", "Patel", "Iyer", "Khan", "Reddy", "Das", "Nair", "Gupta", "Singh", "Fernandes", "Bose", "Joshi",
    "Mehta", "Pillai", "Rao", "Chawla",
]  # fmt: skip
_PLACES = [
    "Pune", "Jaipur", "Kochi", "Indore", "Nagpur", "Lucknow", "Surat", "Mysuru", "Bhopal", "Patna", "Vadodara",
    "Guwahati",
]  # fmt: skip
_PRODUCTS = ("home loan", "term insurance", "solar rooftop", "school admission", "used car")
# Too short, empty, words, what a spreadsheet makes of a number, a number of another country.
_BAD = ("12345", "", "not given", "9.99979E+09", "+1 415 555 2671")
_BAD_EVERY = 40


def write_leads(path: Path, count: int, *, seed: int) -> None:
    """Write a CSV of *count* rows: one in 40 is no lead, and a few say the same person twice in another spelling."""
    rng = random.Random(seed)  # noqa: S311 - made-up people
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        out = csv.writer(file)
        out.writerow(["phone", "customer_name", "place", "product", "crm_note"])
        numbers: list[str] = []
        for index in range(count):
            name = f"{rng.choice(_NAMES)} {rng.choice(_FAMILIES)}"
            rest = [name, rng.choice(_PLACES), rng.choice(_PRODUCTS), f"row {index + 1}, from the web form"]
            if index % _BAD_EVERY == _BAD_EVERY - 1:
                out.writerow([_BAD[(index // _BAD_EVERY) % len(_BAD)], *rest])
            elif index % 97 == 96:
                out.writerow([f"0{rng.choice(numbers)}", *rest])  # the same person with a trunk zero
            else:
                number = f"9{rng.randrange(10**8):08d}{rng.randrange(10)}"
                numbers.append(number)
                out.writerow([_spelled(number, index), *rest])


def _spelled(number: str, index: int) -> str:
    forms = (number, f"+91 {number[:5]}-{number[5:]}", f"0{number}", f"91{number}")
    return forms[index % len(forms)]
