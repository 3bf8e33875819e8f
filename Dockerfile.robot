# The robot side. Build in the repository's root; docs/deployment.md says how it is run:
#
#   docker build -f Dockerfile.robot -t grasp-cube-robot .                        Astribot S1 and replay, without torch
#   docker build -f Dockerfile.robot --build-arg ROBOT=so101 -t grasp-cube-so101 .  LeRobot's arms: brings torch
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS wheels
ARG UV=uv
RUN python3 -m venv /uv && /uv/bin/pip install --quiet "${UV}"
WORKDIR /src
COPY . .
RUN /uv/bin/uv build --quiet --wheel --out-dir /wheels packages/env-client

FROM ${BASE}
ARG ROBOT=astribot
# The installer, the wheel and the downloads are only lent to this step.
RUN --mount=type=bind,from=wheels,source=/,target=/build \
    --mount=type=cache,target=/var/cache/uv \
    test -f /build/src/requirements-${ROBOT}.lock || { echo "ROBOT is '${ROBOT}'; astribot or so101 was expected" >&2; exit 2; } \
    && install="env XDG_CACHE_HOME=/var/cache /build/uv/bin/uv pip install --quiet --system --link-mode copy --no-deps" \
    && $install --require-hashes -r /build/src/requirements-${ROBOT}.lock \
    && $install /build/wheels/*.whl \
    # Headers and compilers are for building against torch; one program beside them is its own.
    && cd "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include nvidia/*/include \
    && find . -path './torch/bin/*' -type f ! -name torch_shm_manager -delete \
    # Bytecode of what the commands import: their user may not write it later.
    && for command in run_env_client run_fake_env_client check_robot; do $command --help >/dev/null; done \
    && python3 -c "import env_client.rollout, env_client.replay, env_client.envs.${ROBOT}"
# Serial ports and cameras belong to these groups.
RUN useradd --create-home --uid 1000 --groups dialout,video robot
USER robot
# Records are written below.
WORKDIR /home/robot
ENV PYTHONUNBUFFERED=1
CMD ["run_env_client", "--help"]
