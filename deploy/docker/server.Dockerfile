# The oracle server. Built from the root of the repository:
#   docker build -f deploy/docker/server.Dockerfile -t step-oracle .
#
# Another base needs Python 3.11 as `python` with pip and venv, and coreutils; the tests build with one of their own.
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
# Extras of the distribution, comma-separated.
ARG EXTRAS=server,oci,postgres
COPY deploy/docker/server-constraints.txt /constraints.txt
COPY --from=wheel /wheels /wheels
# Layers keep whole seconds only, and both numba and Python compare a compiled file with its source's time: times are
# made whole before anything is compiled.
RUN python -m venv /opt/step-oracle \
 && wheel="$(echo /wheels/step_oracle-*.whl)" \
 && /opt/step-oracle/bin/python -m pip install --no-cache-dir --no-compile --only-binary=:all: \
      --constraint /constraints.txt "${wheel}[${EXTRAS}]" \
 && /opt/step-oracle/bin/python -m pip uninstall --yes pip setuptools \
 && find /opt/step-oracle -exec touch -h -d @1767225600 {} + \
 && /opt/step-oracle/bin/python -m compileall -q /opt/step-oracle/lib
ENV NUMBA_CACHE_DIR=/opt/step-oracle/numba-cache
RUN /opt/step-oracle/bin/python -c "from oracle_server.state.kernels import warm_kernels; warm_kernels()" \
 && find "${NUMBA_CACHE_DIR}" -type f -exec sha256sum {} + > /sums \
 && sha256sum /sums > /sum \
 && cut -c1-16 /sum > "${NUMBA_CACHE_DIR}/key"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="step-oracle" \
      org.opencontainers.image.description="Answers how long every step of an emulated vLLM engine takes" \
      org.opencontainers.image.licenses="Apache-2.0"
# One user id in this image and in the engine's: an engine may then use the server's Unix socket.
RUN groupadd --gid 10001 step-oracle \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/step-oracle --shell /usr/sbin/nologin step-oracle \
 && install -d -o 10001 -g 10001 -m 0750 /var/lib/step-oracle /var/cache/step-oracle /run/step-oracle
COPY --from=environment /opt/step-oracle /opt/step-oracle
COPY --chmod=0755 deploy/docker/entrypoint.sh /usr/local/bin/step-oracle-entrypoint
# Reachable through the socket until certificates are mounted: the server listens at no outside address without TLS.
ENV PATH=/opt/step-oracle/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    STEP_ORACLE_LISTEN=unix:/run/step-oracle/oracle.sock \
    STEP_ORACLE_STATE_DIR=/var/lib/step-oracle \
    STEP_ORACLE_TARGET=unix:/run/step-oracle/oracle.sock
USER 10001:10001
WORKDIR /var/lib/step-oracle
EXPOSE 8470 8471
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["step-oracle", "health", "--target", "unix:/run/step-oracle/oracle.sock"]
ENTRYPOINT ["step-oracle-entrypoint"]
CMD ["serve"]
