"""The web process of a checkout: `python web.py` serves it, and `web:app` is the WSGI app for another server."""

if __name__ == "__main__":
    from pipeline.web.__main__ import main

    main()
else:
    from pipeline.web.wsgi import app

    __all__ = ["app"]
