# The server on a GPU: PyPI's torch brings the CUDA libraries, the host's driver is all that it needs beside them.
#
#   docker build --tag attnd .
#   docker run --gpus all --read-only --tmpfs /tmp --volume attnd-cache:/var/cache/attnd --network host attnd
#
# It listens on loopback like `attnd serve` anywhere; deploy/compose.yaml shows how to open it. `make image-test`
# builds it without docker, and runs it.

# A release is built with `--build-arg BASE=python:3.12-slim-bookworm@sha256:...`, see CONTRIBUTING.md.
ARG BASE=python:3.12-slim-bookworm

# What the server stands on, gigabytes, from wheels whose hashes are in locks/.
# hadolint ignore=DL3006
FROM ${BASE} AS packages
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install --yes --no-install-recommends binutils
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_NO_DEPS=1
WORKDIR /src
COPY locks locks
# Of torch a CPU build if pip is configured to find one, see the Makefile; else PyPI's, with CUDA, which needs the last file.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/attnd \
    && pip() { /opt/build/bin/pip "$@"; } \
    && pip install --require-hashes --requirement locks/build.lock \
    && { pip --python /opt/attnd/bin/python install --require-hashes --requirement locks/torch-cpu.lock || true; } \
    && pip --python /opt/attnd/bin/python install --require-hashes --requirement locks/server.lock \
    && case "$(pip --python /opt/attnd/bin/python show torch)" in *nvidia-*) \
         pip --python /opt/attnd/bin/python install --require-hashes --requirement locks/cuda.lock ;; esac
# Most of a gigabyte that nothing loads: archives and headers for compilers, a profiler, libraries that no other file
# names, and what debuggers read. Triton's own headers stay: its launchers are compiled with them.
# hadolint ignore=DL3003
RUN cd /opt/attnd/lib/python3*/site-packages \
    && find . -name '*.a' -delete \
    && rm -rf torch/include nvidia/*/include triton/backends/nvidia/lib/cupti triton/_C/libproton.so \
         nvidia/cu*/lib/libcusolverMg.so* nvidia/cu*/lib/libnvrtc*.alt.so* nvidia/nvshmem/lib/libnvshmem_device.bc \
    && if [ -e triton/_C/libtriton.so ]; then strip --strip-debug triton/_C/libtriton.so; fi

# Ours: a layer of its own, so that an update of it is small.
FROM packages AS code
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /wheels \
    && /opt/build/bin/pip --python /opt/attnd/bin/python install --prefix /code /wheels/*.whl \
    && cp -r /code/. /opt/attnd && /opt/build/bin/pip --python /opt/attnd/bin/python check

# Kernels of common geometries, compiled for the GPUs that are named here: no GPU is needed for it. A build of torch
# without CUDA has no Triton, and gets none.
FROM code AS kernels
# hadolint ignore=DL3008,DL3009
RUN apt-get install --yes --no-install-recommends gcc libc6-dev
RUN mkdir /kernels \
    && if [ -e "$(echo /opt/attnd/lib/python3*/site-packages/triton)" ]; then \
         /opt/attnd/bin/attnd kernels --kernel-cache /kernels --target sm_80 --target sm_89 --target sm_90; fi \
    && chmod -R go+rX /kernels

# hadolint ignore=DL3006
FROM ${BASE}
# Triton compiles a launcher for each kernel when it first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# A number, so that Kubernetes can see that it is not root. Its caches are all that it writes, beside /tmp, and with
# ATTND_SNAPSHOT_DIR=/var/lib/attnd/snapshots what its clients stored, if a volume is mounted at /var/lib/attnd.
RUN install --directory --owner=10001 --group=10001 /var/cache/attnd \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/attnd
COPY --from=packages /opt/attnd /opt/attnd
COPY --from=code /code /opt/attnd
COPY --from=kernels /kernels /opt/attnd/share/attnd/kernels
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
