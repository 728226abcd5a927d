#!/usr/bin/env bash
# Builds and runs each stack of docker-compose.yml that needs no GPU, drives it with the client, and hurts it; writes
# build/containers.json. Needs Docker with Compose, and the project's environment (`make .venv/.ready`). Leaves nothing running.
#
#   tests/containers/run.sh [PART…]     parts: laptop, scaled, replicas, observed, told
#
# With PYTHON_IMAGE, REDIS_IMAGE, PROXY_IMAGE and PROMETHEUS_IMAGE other images take the place of the official ones; with
# FROM_DEBIAN=1 the last two are built upon PYTHON_IMAGE of Debian's packages, for machines that reach no image registry.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD

docker info >/dev/null || { echo "no Docker engine answers" >&2; exit 2; }
if [[ ${FROM_DEBIAN:-} ]]; then
    for name in haproxy prometheus; do
        docker build --quiet --network host -t "anchorwell-tried/$name" - >/dev/null <<DOCKERFILE
FROM $PYTHON_IMAGE
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $name >/dev/null
RUN install --directory --owner 65534 /prometheus
USER 65534
DOCKERFILE
    done
    docker build --quiet -t anchorwell-tried/prometheus - >/dev/null <<'DOCKERFILE'
FROM anchorwell-tried/prometheus
ENTRYPOINT ["prometheus"]
DOCKERFILE
    export PROXY_IMAGE=anchorwell-tried/haproxy PROMETHEUS_IMAGE=anchorwell-tried/prometheus
fi

.venv/bin/python -m tests.containers.drive "$@"
left=$(docker ps -aq --filter label=com.docker.compose.project=anchorwell-tried)
[[ -z $left ]] || { echo "left behind: $left" >&2; exit 1; }
