#!/bin/sh
# Writes the files of passwords that deploy/compose.yaml reads: deploy/compose/secrets/*.env, random, readable by their owner
# alone. Files that are there stay as they are: PostgreSQL knows a password from its first start on.
# Another folder: make-secrets.sh FOLDER, and SECRETS_DIR=FOLDER (absolute, or as seen from deploy/) for compose.
set -eu
umask 077
cd "${1:-$(dirname "$0")/secrets}"

password() { od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'; }

if [ -e services.env ] || [ -e source.env ] || [ -e sink.env ]; then
  echo "passwords are there already: $(pwd)"
else
  source_password=$(password)
  sink_password=$(password)
  printf 'SOURCE_PASSWORD=%s\nSINK_PASSWORD=%s\n' "$source_password" "$sink_password" > services.env
  printf 'POSTGRES_PASSWORD=%s\nTABLEWIRE_PASSWORD=%s\n' "$(password)" "$source_password" > source.env
  printf 'POSTGRES_PASSWORD=%s\nTABLEWIRE_PASSWORD=%s\n' "$(password)" "$sink_password" > sink.env
  echo "passwords written: $(pwd)"
fi
[ -e grafana.env ] || printf 'GF_SECURITY_ADMIN_PASSWORD=%s\n' "$(password)" > grafana.env
