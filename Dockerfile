# The server on a GPU: PyPI's torch brings the CUDA libraries, the host's driver is all that it needs beside them.
#
#   docker build --tag attnd .
#   docker run --gpus all --read-only --tmpfs /tmp --volume attnd-cache:/var/cache/attnd --network host attnd
#
# It listens on loopback like `attnd serve` anywhere; deploy/compose.yaml shows how to open it.

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/attnd
WORKDIR /src
# First what it stands on, gigabytes, under empty packages: a layer that a change of our code leaves alone.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client/attnd/_version.py client/attnd/_version.py
RUN mkdir -p server/attnd_server && /opt/attnd/bin/pip install --constraint constraints.txt '.[server]'
COPY client client
COPY server server
RUN /opt/attnd/bin/pip install --no-deps --force-reinstall .

FROM python:3.12-slim-bookworm
# Triton compiles a launcher for each kernel when it first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# A number, so that Kubernetes can see that it is not root. Its caches are all that it writes, beside /tmp, and with
# ATTND_SNAPSHOT_DIR=/var/lib/attnd/snapshots what its clients stored, if a volume is mounted at /var/lib/attnd.
RUN install --directory --owner=10001 --group=10001 /var/cache/attnd \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/attnd
COPY --from=build /opt/attnd /opt/attnd
ENV PATH=/opt/attnd/bin:$PATH \
    HOME=/var/cache/attnd \
    TRITON_CACHE_DIR=/var/cache/attnd/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/attnd/inductor \
    CUDA_CACHE_PATH=/var/cache/attnd/cuda \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME /var/cache/attnd
EXPOSE 7411
# With TLS it needs ATTND_TLS_CA, and ATTND_TLS_SERVER_NAME where the certificate is not for localhost; no token.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "attnd_server.health_probe", "localhost:7411"]
# The process itself gets SIGTERM, and drains.
ENTRYPOINT ["attnd", "serve"]
