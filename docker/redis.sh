#!/bin/sh
# A Redis or a Sentinel of the stack, from the settings that it left in its volume; the first time from these.
#
#   redis.sh node ADDRESS       a Redis; at first the one with that address is the primary, others copy it
#   redis.sh sentinel ADDRESS   a Sentinel that looks after them
#
# A write counts when it is on the disks of two: the primary takes none while no replica follows (min-replicas-to-write), and
# the service waits for one to confirm it (WAIT). Nothing is ever evicted.
set -eu
what=$1 primary=$2
settings=/data/$what.conf

if [ ! -s "$settings" ]; then
    if [ "$what" = sentinel ]; then
        cat >"$settings.new" <<SETTINGS
port 26379
bind 0.0.0.0
protected-mode no
dir /data
sentinel monitor anchorwell $primary 6379 2
sentinel down-after-milliseconds anchorwell 3000
sentinel failover-timeout anchorwell 20000
sentinel parallel-syncs anchorwell 1
SETTINGS
    else
        cat >"$settings.new" <<SETTINGS
bind 0.0.0.0
protected-mode no
dir /data
appendonly yes
appendfsync always
maxmemory-policy noeviction
min-replicas-to-write 1
min-replicas-max-lag 5
repl-diskless-sync-delay 0
SETTINGS
        hostname -i | tr ' ' '\n' | grep -qxF "$primary" || echo "replicaof $primary 6379" >>"$settings.new"
    fi
    mv "$settings.new" "$settings"
fi

set -- redis-server "$settings"
[ "$what" = node ] || set -- "$@" --sentinel
if command -v docker-entrypoint.sh >/dev/null; then
    exec docker-entrypoint.sh "$@" # of the official image: gives up root
fi
exec "$@"
