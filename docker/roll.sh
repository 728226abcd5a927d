#!/bin/sh
# Puts another bundle, release or setting in the place of what a scale stack runs, without a failed request: as many new
# replicas and workers are started beside the old, and when these are ready the old end what they do, and go.
#
#   ANCHORWELL_BUNDLE=./another-bundle docker/roll.sh
set -eu
cd "$(dirname "$0")/.."
compose() {
    if docker compose version >/dev/null 2>&1; then docker compose --profile scale "$@"; else docker-compose --profile scale "$@"; fi
}

for service in replica worker; do
    old=$(compose ps -q "$service")
    count=$(echo "$old" | wc -w)
    compose up -d --no-deps --no-recreate --scale "$service=$((2 * count))" "$service"
    for container in $(compose ps -q "$service"); do
        waited=0
        until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
            waited=$((waited + 1))
            if [ "$waited" -gt 180 ]; then
                echo "$service $container does not become healthy: the old ones were left as they are" >&2
                docker logs --tail 5 "$container" >&2
                exit 1
            fi
            sleep 1
        done
    done
    # shellcheck disable=SC2086
    docker stop -t 75 $old >/dev/null && docker rm $old >/dev/null
    echo "$count of $service are new"
done
