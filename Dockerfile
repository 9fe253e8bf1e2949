# Two images from one file: `api` has no torch, `worker` trains. Needs BuildKit (the default since Docker 23).
#
#   docker build --target api -t flatlora-api .
#   docker build --target worker -t flatlora-worker .
#
# Build arguments and secrets, all optional:
#   --build-arg PYTHON_IMAGE=…           another base, such as a mirror's
#   --build-arg TORCH_INDEX=…            where torch is fetched from, such as PyTorch's index of CPU builds;
#                                        empty: pip's own index, whose torch on linux/amd64 comes with CUDA
#   --build-arg COMMIT=$(git rev-parse HEAD)   shown by GET /version
#   --secret id=pip_conf,src=pip.conf    pip's settings: a mirror and its password stay out of the image

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/flatlora/bin:$PATH
# tini hands signals on and reaps what a killed worker leaves behind.
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 flatlora \
 && useradd --uid 10001 --gid flatlora --home-dir /var/lib/flatlora --shell /usr/sbin/nologin flatlora \
 && install -d -m 0700 -o flatlora -g flatlora /var/lib/flatlora /var/cache/flatlora


# What both need, and what only a worker needs on top. The packages that change seldom come first:
# pip reads the names of our own from empty folders, so that a changed line of code keeps these layers.
FROM base AS packages
WORKDIR /src
# The image gets no pip: the base's installs into it.
RUN python -m venv --without-pip /opt/flatlora
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY flatlora/pyproject.toml flatlora/
COPY client/pyproject.toml client/README.md client/
RUN mkdir -p app migrations worker client/flatlora_client \
 && cp LICENSE flatlora/ && cp LICENSE client/ \
 && touch flatlora/__init__.py client/flatlora_client/__init__.py
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip --python /opt/flatlora/bin/python install --disable-pip-version-check -c constraints.txt ./client ".[api,cluster,telemetry]"

FROM packages AS worker-packages
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    if [ -n "$TORCH_INDEX" ]; then \
      pip --python /opt/flatlora/bin/python install --disable-pip-version-check -c constraints.txt --index-url "$TORCH_INDEX" torch; \
    fi \
 && pip --python /opt/flatlora/bin/python install --disable-pip-version-check -c constraints.txt ./client ./flatlora ".[worker,gpu,cluster,telemetry]"

FROM packages AS api-build
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip --python /opt/flatlora/bin/python install --disable-pip-version-check --no-deps --force-reinstall ./client .

FROM worker-packages AS worker-build
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip --python /opt/flatlora/bin/python install --disable-pip-version-check --no-deps --force-reinstall ./client ./flatlora .


FROM base AS runtime
ENV FLATLORA_DATA_DIR=/var/lib/flatlora \
    HF_HOME=/var/cache/flatlora/huggingface
WORKDIR /var/lib/flatlora
VOLUME /var/lib/flatlora
USER 10001:10001
ENTRYPOINT ["tini", "--", "flatlora"]


FROM runtime AS worker
LABEL org.opencontainers.image.title="flatlora worker" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=worker-build /opt/flatlora /opt/flatlora
# The GPUs that the NVIDIA container toolkit hands in, and what torch uses of its driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
HEALTHCHECK --interval=15s --timeout=20s --start-period=60s --retries=3 \
    CMD ["flatlora", "worker", "--check"]
CMD ["worker"]


# Last, so that a build without --target is the small one.
FROM runtime AS api
LABEL org.opencontainers.image.title="flatlora api" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=api-build /opt/flatlora /opt/flatlora
ARG COMMIT=
ENV FLATLORA_HOST=0.0.0.0 \
    FLATLORA_PORT=8321 \
    FLATLORA_COMMIT=$COMMIT
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['FLATLORA_PORT']), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
CMD ["api"]
