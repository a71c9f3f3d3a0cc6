# One image for every process: `python -m pipeline.web` by default, `celery -A worker …` or `pipeline …` by command.
#
#   docker build -t futwork-lead-pipeline .
#   docker build -t futwork-lead-pipeline:sandbox --build-arg EXTRAS=embedded .

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/pipeline
ENV PATH=/opt/pipeline/bin:$PATH
WORKDIR /src

# The dependencies alone first: this layer stays as it is until one of these two files changes.
ARG EXTRAS=server,cli,postgres,flower,curl,sentry,otel
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
more = [need for extra in '${EXTRAS}'.split(',') for need in p['optional-dependencies'][extra]]; \
print(*p['dependencies'], *more, sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md ./
COPY pipeline pipeline
RUN pip install --no-deps .


FROM python:3.11-slim-bookworm
ENV PATH=/opt/pipeline/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin pipeline \
    && mkdir -p /app/var/spool \
    && chown -R 10001:10001 /app/var
COPY --from=build /opt/pipeline /opt/pipeline
WORKDIR /app
COPY worker.py web.py ./
USER 10001:10001
EXPOSE 8000

# Only the web process answers this; docker-compose.yml gives the other processes checks of their own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "pipeline.web"]
