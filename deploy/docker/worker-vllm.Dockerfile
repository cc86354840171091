# A worker whose engine is vLLM, on vLLM's own image: its Python, torch, CUDA libraries and kernels as they are, and
# Tandem beside them. From the repository's root:
#   docker build -f deploy/docker/worker-vllm.Dockerfile --target prefill -t tandem-prefill:vllm .
#   docker build -f deploy/docker/worker-vllm.Dockerfile --target decode -t tandem-decode:vllm .
# The targets are prefill, decode and elastic, which share all layers. The base is for GPUs; its tag is the vLLM that was tested
# (constraints-vllm.txt). 9 GB, of which Tandem is 0.2. Routers and store nodes have images without vLLM.
# The base's packages are the system's Python 3.12's. A venv above them takes what Tandem adds: nothing of the base is
# overwritten.
FROM vllm/vllm-openai:v0.32.0 AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tandem/bin:$PATH
WORKDIR /src
# The compiler builds the CPU kernels, among them those that check blocks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/tandem
COPY constraints-vllm.txt ./
# What vLLM is made of stays in the base's versions, what the base lacks comes in the tested ones. pip leaves the rest of
# the base as it is, unless Tandem needs more. `complaints` are what pip says of the base by itself.
RUN python -m pip list --format freeze > base.txt \
    && awk -F== '{ name = tolower($1); gsub(/[-_.]+/, "-", name) } \
        FNR == NR { has[name]; if (name ~ /^(vllm|torch|triton|cuda|nvidia|flashinfer|nixl|numpy|transformers)/) print; next } \
        !(name in has)' base.txt constraints-vllm.txt > constraints.txt \
    && { python -m pip check > complaints.txt || true; }
COPY pyproject.toml setup.py README.md LICENSE ./
COPY proto proto
COPY kvstore kvstore
COPY services services
RUN pip install --constraint constraints.txt ".[worker,nixl,vllm]"
# Whatever pip says now, and did not say of the base, ends the build; so does a vLLM or torch of our own.
RUN { python -m pip check > now.txt || true; } \
    && { grep --invert-match --line-regexp --fixed-strings --file complaints.txt now.txt > new.txt || true; } \
    && ! grep --invert-match "^No broken requirements found" new.txt \
    && test -z "$(find /opt/tandem/lib -maxdepth 3 -name vllm -o -maxdepth 3 -name torch)"

FROM vllm/vllm-openai:v0.32.0 AS runtime
# The libraries by which UCX reaches RDMA devices; without such a device they do nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /nonexistent tandem \
    && install --directory --owner tandem /cache
COPY --from=build /opt/tandem /opt/tandem
# /cache holds what comes from the hub, and what vLLM, Triton and FlashInfer compile and then load, so it may not be
# mounted noexec; kept over restarts, they start sooner. Everything else is written to /tmp and /dev/shm.
# TANDEM_MODEL and TANDEM_ADVERTISE_HOST, the address that other workers reach, are for whoever runs the image to say.
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/cache \
    HF_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TANDEM_ENGINE=vllm \
    TANDEM_HOST=0.0.0.0 \
    TANDEM_PORT=7000 \
    TANDEM_KV_PORT=7001 \
    TANDEM_HTTP_PORT=7080 \
    TANDEM_LOG_FORMAT=json
# The base's is full of examples.
WORKDIR /
USER 10001
# gRPC, block protocol, /metrics and /health. UCX listens on ports of its own choice besides.
EXPOSE 7000 7001 7080
HEALTHCHECK --interval=10s --timeout=5s --start-period=1800s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['TANDEM_HTTP_PORT'] + '/health', timeout=4)"]

FROM runtime AS prefill
ENTRYPOINT ["tandem", "prefill"]

FROM runtime AS elastic
ENTRYPOINT ["tandem", "elastic"]

FROM runtime AS decode
ENTRYPOINT ["tandem", "decode"]
