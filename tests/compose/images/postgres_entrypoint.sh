#!/bin/sh
# Handles POSTGRES_PASSWORD, POSTGRES_DB and /docker-entrypoint-initdb.d like the official image. At the first start: initdb, a
# server on the Unix socket only, the database, the scripts in order. Then runs the command as process 1.
set -eu

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  : "${POSTGRES_PASSWORD:?}"
  printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
  initdb --pgdata="$PGDATA" --username=postgres --pwfile=/tmp/password --encoding=UTF8 --locale=C \
    --auth-local=trust --auth-host=scram-sha-256 --no-sync > /dev/null
  rm /tmp/password
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  echo 'host replication all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  pg_ctl --pgdata="$PGDATA" --silent --wait --options="-c listen_addresses= -c unix_socket_directories=/run/postgresql" start
  psql --host=/run/postgresql --username=postgres --quiet --command="CREATE DATABASE \"$POSTGRES_DB\""
  for script in /docker-entrypoint-initdb.d/*.sql; do
    [ -e "$script" ] || continue
    psql --host=/run/postgresql --username=postgres --dbname="$POSTGRES_DB" --no-psqlrc --quiet \
      --set=ON_ERROR_STOP=1 --file="$script"
  done
  pg_ctl --pgdata="$PGDATA" --silent --wait --mode=fast stop
fi

if [ "$1" = postgres ]; then
  shift
  set -- postgres -c listen_addresses='*' -c unix_socket_directories=/run/postgresql "$@"
fi
exec "$@"
