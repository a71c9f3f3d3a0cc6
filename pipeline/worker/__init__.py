"""The Celery app of workers, beat and Flower: `celery -A pipeline.worker worker|beat|flower`.

`tasks` holds the five tasks, `guard` sees that no message is lost, `consumer` and `request` are Celery's own with what
a promise needs, `dead_letters` quarantines, `beat` and `heartbeat` report that a process lives. `app` puts them
together; only `celery`, the entry module, reads the settings and builds an app.
"""
