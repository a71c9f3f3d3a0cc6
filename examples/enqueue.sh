#!/bin/sh
# Hand leads in over HTTP with curl. It tries again while the broker is away; nobody is called twice for it.
curl --silent --show-error --fail-with-body --retry 3 \
  --header "Authorization: Bearer $INTAKE_TOKEN" --json @- \
  "${PIPELINE_URL:-http://127.0.0.1:8000}/v1/campaigns/68ecc86fd9fbecbe9431a18e/leads" <<'LEADS'
[
  {"phone": "99997 89877", "data": {"customer_name": "Asha", "place": "Pune"}},
  {"phone": "+91 98111 22334", "data": {"customer_name": "Ravi", "place": "Jaipur"}},
  {"phone": "not given", "data": {"customer_name": "Meera", "place": "Kochi"}}
]
LEADS
