# The robot side. Build in the repository's root; docs/deployment.md says how it is run:
#
#   docker build -f Dockerfile.robot -t grasp-cube-robot .                        Astribot S1 and replay, without torch
#   docker build -f Dockerfile.robot --build-arg ROBOT=so101 -t grasp-cube-so101 .  LeRobot's arms: brings torch
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS installer
ARG UV=uv
RUN python3 -m venv /uv && /uv/bin/pip install --quiet "${UV}"
# Debian's podman mounts a stage that it takes from its cache without the last layer: so the last one is empty.
WORKDIR /

FROM installer AS wheels
WORKDIR /src
COPY . .
RUN /uv/bin/uv build --quiet --wheel --out-dir /wheels packages/env-client

FROM ${BASE}
ARG ROBOT=astribot
# The installer and the downloads are only lent. What is installed is copied first, so that every builder notices
# when it changed; and the dependencies are a layer of their own, which a change of the code leaves alone.
COPY requirements-*.lock /wheels/
RUN --mount=type=bind,from=installer,source=/uv,target=/uv \
    --mount=type=cache,target=/var/cache/uv \
    test -f /wheels/requirements-${ROBOT}.lock || { echo "ROBOT is '${ROBOT}'; astribot or so101 was expected" >&2; exit 2; } \
    && XDG_CACHE_HOME=/var/cache /uv/bin/uv pip install --quiet --system --link-mode copy --no-deps \
        --require-hashes -r /wheels/requirements-${ROBOT}.lock \
    # Headers and compilers are for building against torch; one program beside them is its own.
    && cd "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include nvidia/*/include \
    && find . -path './torch/bin/*' -type f ! -name torch_shm_manager -delete
COPY --from=wheels /wheels /wheels
# Bytecode of what the commands import: their user may not write it later.
RUN --mount=type=bind,from=installer,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --system --no-cache --no-deps /wheels/*.whl \
    && for command in run_env_client run_fake_env_client check_robot; do $command --help >/dev/null || exit; done \
    && python3 -c "import env_client.rollout, env_client.replay, env_client.envs.${ROBOT}"
# Serial ports and cameras belong to these groups.
RUN useradd --create-home --uid 1000 --groups dialout,video robot
USER robot
# Records are written below.
WORKDIR /home/robot
ENV PYTHONUNBUFFERED=1
CMD ["run_env_client", "--help"]
