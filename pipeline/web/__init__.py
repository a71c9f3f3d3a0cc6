"""The web process: Futwork's webhook, the HTTP intake, health, metrics, and the status pages under `/ops`.

- `__main__`, `serving`: `python -m pipeline.web` starts the server
- `wsgi`, `app`: the WSGI app, from the environment or from given settings
- `webhook`, `intake`, `bodies`: what comes in
- `health`, `metrics`, `openapi`: what the process says about itself
- `ops`: the status pages
"""
