# The router: OpenAI's HTTP API in front of the workers. It needs no GPU and has no torch. From the repository's root:
#   docker build -f deploy/docker/router.Dockerfile -t tandem-router:cpu .
# MODEL=demo puts the demo model into the image, at /models/tandem-demo: routers read a model's tokenizer where its
# workers read the model.
ARG MODEL=none

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tandem/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/tandem
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY kvstore kvstore
COPY services services
RUN pip install --constraint constraints.txt ".[router]"

FROM python:3.11-slim-bookworm AS runtime
RUN useradd --system --uid 10001 --home-dir /nonexistent tandem \
    && install --directory --owner tandem /cache
COPY --from=build /opt/tandem /opt/tandem
# /cache holds what comes from the hub; everything else is written to /tmp, so the root file system can be read-only.
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    TANDEM_HOST=0.0.0.0 \
    TANDEM_PORT=8000 \
    TANDEM_LOG_FORMAT=json
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['TANDEM_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["tandem", "router"]

FROM runtime AS model-none

FROM runtime AS model-demo
COPY services/cli/demo_model/tandem-demo /models/tandem-demo

# hadolint ignore=DL3006
FROM model-${MODEL}
