"""The campaigns whose messages kill: apart from `deadly_worker`, which builds a worker's app when it is imported."""

KILLS_ITS_PROCESS = "deadly-child"
KILLS_THE_WORKER = "deadly-worker"
