# Workers: prefill (computes the KV blocks of prompts), decode (pulls them and streams tokens), elastic (does both). A
# target each, which share all layers. From the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile --target prefill -t tandem-prefill:cpu .
#   docker build -f deploy/docker/worker.Dockerfile --target decode -t tandem-decode:cuda --build-arg VARIANT=cuda .
# VARIANT=cuda brings torch's CUDA build, and nixl for RDMA.
# TORCH_INDEX says where torch comes from (empty: the configured package index); MODEL=demo puts the demo model into the
# image, at /models/tandem-demo.
ARG VARIANT=cpu
ARG MODEL=none

FROM python:3.11-slim-bookworm AS variant-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV TORCH_INDEX=${TORCH_INDEX} EXTRAS=worker

# Every CUDA library comes with torch; the driver comes from the host. nixl reads over RDMA and CUDA IPC.
FROM python:3.11-slim-bookworm AS variant-cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ENV TORCH_INDEX=${TORCH_INDEX} EXTRAS=worker,nixl

# hadolint ignore=DL3006
FROM variant-${VARIANT} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tandem/bin:$PATH
WORKDIR /src
# The compiler builds the CPU kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tandem
COPY constraints.txt ./
RUN pip install --no-deps --constraint constraints.txt torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY pyproject.toml setup.py README.md LICENSE ./
COPY proto proto
COPY kvstore kvstore
COPY services services
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim-bookworm AS runtime
# The libraries by which UCX reaches RDMA devices; without such a device they do nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /nonexistent tandem \
    && install --directory --owner tandem /cache
COPY --from=build /opt/tandem /opt/tandem
# /cache holds what comes from the hub; everything else is written to /tmp, so the root file system can be read-only.
# TANDEM_MODEL and TANDEM_ADVERTISE_HOST, the address that other workers reach, are for whoever runs the image to say.
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TANDEM_HOST=0.0.0.0 \
    TANDEM_PORT=7000 \
    TANDEM_KV_PORT=7001 \
    TANDEM_HTTP_PORT=7080 \
    TANDEM_LOG_FORMAT=json
USER 10001
# gRPC, block protocol, /metrics and /health. UCX listens on ports of its own choice besides.
EXPOSE 7000 7001 7080
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['TANDEM_HTTP_PORT'] + '/health', timeout=4)"]

FROM runtime AS model-none

FROM runtime AS model-demo
COPY services/cli/demo_model/tandem-demo /models/tandem-demo

# hadolint ignore=DL3006
FROM model-${MODEL} AS prefill
ENTRYPOINT ["tandem", "prefill"]

# hadolint ignore=DL3006
FROM model-${MODEL} AS elastic
ENTRYPOINT ["tandem", "elastic"]

# hadolint ignore=DL3006
FROM model-${MODEL} AS decode
ENTRYPOINT ["tandem", "decode"]
