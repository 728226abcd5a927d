#!/bin/sh
# Puts another bundle, release or setting in the place of what a scale stack runs, without a failed request: as many new
# replicas and workers are started beside the old, and when these are ready the old end what they do, and go. Where the new
# do not get ready they go, and the old stay.
#
#   echo ANCHORWELL_BUNDLE=./another-bundle >> .env && docker/roll.sh
#
# Set it in .env, as here: the next `up` takes what stands there.
set -eu
cd "$(dirname "$0")/.."
compose() {
    if docker compose version >/dev/null 2>&1; then docker compose --profile scale "$@"; else docker-compose --profile scale "$@"; fi
}
of() { # the containers of a service, running or not
    docker ps -aq --no-trunc --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"
}
fresh() { # of them, those that are not old
    of "$service" | grep -vxF "$old" || true
}
bundle=$(compose config | sed -n \
    -e 's/^ *- \(.*\):\/bundle:ro$/\1/p' \
    -e '/^ *source: /h' -e '/^ *target: \/bundle$/{x;s/^ *source: *//p;x}' | head -n 1)
[ -f "$bundle/manifest.json" ] || { echo "$bundle holds no manifest.json: it is not a bundle" >&2; exit 1; }

for service in replica worker; do
    id=$(compose ps -q "$service" | head -n 1)
    [ -n "$id" ] || { echo "no $service runs: start the stack first" >&2; exit 1; }
    project=$(docker inspect --format '{{index .Config.Labels "com.docker.compose.project"}}' "$id")
    old=$(of "$service")
    count=$(docker ps -q --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$service" | wc -l)
    trap 'docker rm -f $(fresh) >/dev/null 2>&1 || true' EXIT
    trap 'exit 1' INT TERM
    echo "starting $count of $service with $bundle"
    compose up -d --no-deps --no-recreate --scale "$service=$(($(echo "$old" | wc -l) + count))" "$service"
    for container in $(fresh); do
        waited=0
        until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
            waited=$((waited + 1))
            if [ "$waited" -gt 180 ] || [ "$(docker inspect --format '{{.RestartCount}}' "$container")" -gt 2 ]; then
                docker logs --tail 5 "$container" >&2
                echo "a new $service does not get ready: the new are taken away, the old stay" >&2
                exit 1
            fi
            sleep 1
        done
    done
    trap - EXIT
    echo "they are ready; the old end what they do"
    # shellcheck disable=SC2086
    docker stop -t 75 $old >/dev/null
    # shellcheck disable=SC2086
    docker rm $old >/dev/null
    echo "$count of $service are new"
done
