# A vLLM that serves without a GPU, with the shim in it. Built from the root of the repository:
#   docker build -f deploy/docker/engine.Dockerfile --build-arg TORCH_INDEX=INDEX -t step-oracle-engine .
#
# TORCH_INDEX: a package index of CPU builds of torch. Without it torch comes with its CUDA libraries: gigabytes more,
# nothing else.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY proto proto
COPY oracle_server oracle_server
COPY vllm_shim vllm_shim
COPY profiler profiler
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS environment
ARG VLLM_VERSION=0.33.0
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1
COPY --from=wheel /wheels /wheels
# The installer puts the wheel it is from itself beside vLLM.
RUN python -m venv /opt/installer \
 && /opt/installer/bin/python -m pip install /wheels/step_oracle-*.whl \
 && /opt/installer/bin/step-oracle vllm-install "${VLLM_VERSION}" --venv /opt/vllm \
      ${TORCH_INDEX:+--torch-index "${TORCH_INDEX}"}

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="step-oracle-engine" \
      org.opencontainers.image.description="vLLM emulating a GPU it does not have" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 step-oracle \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/vllm --shell /usr/sbin/nologin step-oracle \
 && install -d -o 10001 -g 10001 -m 0750 /var/lib/vllm
COPY --from=environment /opt/vllm /opt/vllm
# The model's folder needs config and tokenizer, no weights; nothing is asked of a hub.
ENV PATH=/opt/vllm/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/vllm \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    STEP_ORACLE_TARGET=unix:/run/step-oracle/oracle.sock
USER 10001:10001
WORKDIR /var/lib/vllm
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["/models/model", "--load-format", "dummy", "--host", "0.0.0.0", "--port", "8000"]
