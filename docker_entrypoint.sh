#!/bin/sh
# The server's container: environment variables become serve_policy's flags; further arguments are passed on.
#
#   TASK        lift (default), sort, stack or a yaml file; empty: none is checked, and without MODEL_PATH the server
#               waits for a client to name a checkpoint below /checkpoints
#   MODEL_PATH  folder of a checkpoint in the container; default: the task's own
#   DEVICE      cuda (default), cuda:N or cpu
#   HOST, PORT  where it listens; default 0.0.0.0 and 8000
#   API_KEY     key that clients must send; default: none
set -eu

fail() {
    echo "docker_entrypoint.sh: $*" >&2
    exit 2
}

TASK=${TASK-lift}
MODEL_PATH=${MODEL_PATH:-}
DEVICE=${DEVICE:-cuda}
HOST=${HOST:-0.0.0.0}
PORT=${PORT:-8000}

case $PORT in
    *[!0-9]* | ??????*) fail "PORT is '$PORT'; a number from 1 to 65535 was expected" ;;
esac
[ "$PORT" -ge 1 ] && [ "$PORT" -le 65535 ] || fail "PORT is '$PORT'; a number from 1 to 65535 was expected"
case $DEVICE in
    cpu | cuda | cuda:[0-9] | cuda:[0-9][0-9]) ;;
    *) fail "DEVICE is '$DEVICE'; cuda, cuda:N or cpu was expected" ;;
esac
if [ -n "$MODEL_PATH" ]; then
    [ -e "$MODEL_PATH" ] ||
        fail "MODEL_PATH is '$MODEL_PATH', which is not in the container: mount its folder (-v /your/folder:/checkpoints) and name the path inside it"
    [ -d "$MODEL_PATH" ] || fail "MODEL_PATH is '$MODEL_PATH', a file; the folder of a checkpoint was expected"
    [ -r "$MODEL_PATH" ] && [ -x "$MODEL_PATH" ] ||
        fail "MODEL_PATH is '$MODEL_PATH', which the container's user $(id -u) may not read: chmod it, or docker run --user"
fi

# By the environment: arguments are seen by everybody who may list processes.
if [ -n "${API_KEY:-}" ]; then export GRASP_CUBE_API_KEY="$API_KEY"; fi
unset API_KEY

if [ -n "$MODEL_PATH" ]; then
    set -- --policy.path "$MODEL_PATH" "$@"
elif [ -z "$TASK" ]; then
    set -- --policy.root /checkpoints "$@"
fi
if [ -n "$TASK" ]; then set -- --policy.task "$TASK" "$@"; fi

# The server takes this process over, so that it gets the container's signals.
exec serve_policy --host "$HOST" --port "$PORT" --policy.device "$DEVICE" "$@"
