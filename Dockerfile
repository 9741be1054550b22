# Callora's image: the locked dependencies and the wheel, run by an account that owns nothing.
#
#   docker build -t callora:1.0.0 .

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1

# The build backend, from the development lock alone: a package it needs and the list lacks is refused by its hash.
COPY requirements-dev.lock ./
RUN awk '/^[a-z]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } wanted' \
        requirements-dev.lock > build.lock \
    && pip install --require-hashes -r build.lock

RUN python -m venv /opt/callora
COPY requirements.lock ./
RUN /opt/callora/bin/pip install --require-hashes -r requirements.lock

COPY pyproject.toml README.md ./
COPY callora callora
COPY migrations migrations
RUN python -m hatchling build -t wheel -d dist \
    && /opt/callora/bin/pip install --no-deps --no-index dist/*.whl \
    && /opt/callora/bin/python -m compileall -q /opt/callora/lib \
    && /opt/callora/bin/callora --help > /dev/null

FROM python:3.11-slim-bookworm
RUN groupadd --system --gid 10001 callora \
    && useradd --system --uid 10001 --gid callora --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin callora
COPY --from=build /opt/callora /opt/callora
ENV PATH=/opt/callora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    APP_ENV=production \
    HOST=0.0.0.0 \
    PORT=3000
USER 10001:10001
WORKDIR /
EXPOSE 3000

# /livez answers while the process lives, also while it drains: a drain is no reason to be killed.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/livez', timeout=2)"]

# Exec form and no shell: SIGTERM reaches Callora, which drains for 30 s. Give it 35 (`docker stop -t 35`).
STOPSIGNAL SIGTERM
ENTRYPOINT ["callora"]
CMD ["serve"]
