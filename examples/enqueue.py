"""Hand leads in from a Python backend; the broker is that of BROKER_URL."""

from pipeline import EnqueueFailed, enqueue

LEADS = [
    {"phone": "99997 89877", "data": {"customer_name": "Asha", "place": "Pune"}},
    {"phone": "+91 98111 22334", "data": {"customer_name": "Ravi", "place": "Jaipur"}},
    {"phone": "not given", "data": {"customer_name": "Meera", "place": "Kochi"}},
]

try:
    report = enqueue("68ecc86fd9fbecbe9431a18e", LEADS)
except EnqueueFailed as error:  # the broker is away: send the rows again later
    raise SystemExit(str(error)) from error
for lead_id in report.ids:  # in the broker, and from now on never lost
    print(lead_id)
for row in report.refused:
    print(f"row {row.index + 1} is refused: {row.reason}")
