# A store node: it keeps KV blocks in memory and on disk, over the life of every worker. From the repository's root:
#   docker build -f deploy/docker/store.Dockerfile -t tandem-store:cpu .
#   docker build -f deploy/docker/store.Dockerfile -t tandem-store:cuda --build-arg VARIANT=cuda .
# It needs no GPU and has no torch. VARIANT=cuda is for a fleet of GPU workers that reads over RDMA: nixl does that, and
# nixl itself imports torch, of which the CPU build will do.
ARG VARIANT=cpu

FROM python:3.11-slim-bookworm AS variant-cpu
ENV EXTRAS=store

FROM python:3.11-slim-bookworm AS variant-cuda
ENV EXTRAS=store,nixl

# hadolint ignore=DL3006
FROM variant-${VARIANT} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tandem/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/tandem
COPY constraints.txt ./
RUN case "$EXTRAS" in *nixl*) \
        pip install --no-deps --constraint constraints.txt torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY kvstore kvstore
COPY services services
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim-bookworm
# The libraries by which UCX reaches RDMA devices; without such a device they do nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /nonexistent tandem \
    && install --directory --owner tandem /data
COPY --from=build /opt/tandem /opt/tandem
# Blocks on disk go to /data, if TANDEM_STORE_DISK_DIR says so; everything else is written to /tmp, so the root file
# system can be read-only. TANDEM_ADVERTISE_HOST, the address that workers reach, is for whoever runs the image to say.
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    TANDEM_HOST=0.0.0.0 \
    TANDEM_KV_PORT=7001 \
    TANDEM_HTTP_PORT=7080 \
    TANDEM_LOG_FORMAT=json
USER 10001
# Block protocol, /metrics, /health and /ready. UCX listens on ports of its own choice besides.
EXPOSE 7001 7080
# Healthy while it waits for the first worker, too, which tells it what a block is; /ready answers 200 from then on.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['TANDEM_HTTP_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["tandem", "store"]
