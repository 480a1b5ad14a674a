# The image for `docker run` (same command as `make serve`) and for the cluster, where KubeRay replaces the command.
#   docker build --build-arg DEVICE=cpu --tag farsight:cpu .
#   docker run --init --shm-size 256m --publish 8000:8000 --publish 9000:9000 farsight:cpu
# Metrics (9464) need no key and name tenants: they are for scrapers on the container's or the pod's network, and are not
# exposed, so that `--publish-all` leaves them out, too.

FROM python:3.11-slim-bookworm AS base


FROM base AS build
ARG DEVICE=cpu
# for the CPU build: PyTorch's own index or a mirror of it
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/farsight
WORKDIR /src
COPY constraints.txt ./
# torch first and alone: it is the largest part of the image, and stays cached while the source changes. The CPU build has
# no CUDA libraries. pip then finds torch installed and gets everything else from PyPI.
RUN case "${DEVICE}" in \
        cpu) /opt/farsight/bin/pip install --constraint constraints.txt --no-deps \
                --index-url "${TORCH_INDEX_URL}" torch ;; \
        cuda) /opt/farsight/bin/pip install --constraint constraints.txt torch ;; \
        *) echo "DEVICE: expected cpu or cuda, got '${DEVICE}'" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
RUN /opt/farsight/bin/pip install --constraint constraints.txt '.[demo,gpu,postgres,tracing]'


FROM base AS final
ARG DEVICE=cpu
LABEL org.opencontainers.image.title="farsight" \
      org.opencontainers.image.description="Long-context attention and small transformers as a service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      farsight.device="${DEVICE}"
# KubeRay's probes need bash and wget. Their versions are those of the base image's Debian release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 farsight \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash farsight
COPY --from=build /opt/farsight /opt/farsight
# Variables that Ray reads at import (service/cluster/environment.py sets the same ones when it starts Ray itself; a test
# compares both), then the service's own settings: in a container it listens on all interfaces.
ENV PATH=/opt/farsight/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=disabled \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_HAPROXY_METRICS_PORT=9101 \
    RAY_SERVE_HAPROXY_STATS_PORT=8404 \
    RAY_SERVE_HAPROXY_H2_FE_INITIAL_WINDOW_SIZE=16777216 \
    RAY_SERVE_HAPROXY_H2_BE_INITIAL_WINDOW_SIZE=16777216 \
    RAY_SERVE_HAPROXY_H2_MAX_FRAME_SIZE=65536 \
    RAY_SERVE_HAPROXY_TUNE_BUFSIZE=65536 \
    RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS=256 \
    RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" \
    RAY_SERVE_HAPROXY_RETRIES=1 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/farsight/bin/farsight-haproxy \
    RAY_health_check_timeout_ms=5000 \
    RAY_health_check_failure_threshold=3 \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2 \
    RAY_SERVE_GRPC_MAX_MESSAGE_SIZE=269484032 \
    FARSIGHT_HOST=0.0.0.0 \
    FARSIGHT_METRICS_HOST=0.0.0.0
WORKDIR /home/farsight
# numeric, so that Kubernetes can verify that it is not root
USER 1000:1000
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["bash", "-c", "wget -q --tries=1 -T 4 -O /dev/null http://127.0.0.1:${FARSIGHT_HTTP_PORT:-8000}/healthz"]
CMD ["farsight", "serve", "--demo"]
