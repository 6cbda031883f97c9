#!/bin/sh
# Writes random passwords to the files that deploy/compose.yaml reads, deploy/compose/secrets/*.env, readable by their owner only.
# Existing files are kept, because PostgreSQL reads its password only at its first start.
# For another folder, run make-secrets.sh FOLDER and set SECRETS_DIR=FOLDER (absolute, or relative to deploy/) for compose.
set -eu
umask 077
cd "${1:-$(dirname "$0")/secrets}"

password() { od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'; }

if [ -e services.env ] || [ -e source.env ] || [ -e sink.env ]; then
  echo "passwords already exist: $(pwd)"
else
  source_password=$(password)
  sink_password=$(password)
  printf 'SOURCE_PASSWORD=%s\nSINK_PASSWORD=%s\n' "$source_password" "$sink_password" > services.env
  printf 'POSTGRES_PASSWORD=%s\nTABLEWIRE_PASSWORD=%s\n' "$(password)" "$source_password" > source.env
  printf 'POSTGRES_PASSWORD=%s\nTABLEWIRE_PASSWORD=%s\n' "$(password)" "$sink_password" > sink.env
  echo "passwords written: $(pwd)"
fi
[ -e grafana.env ] || printf 'GF_SECURITY_ADMIN_PASSWORD=%s\n' "$(password)" > grafana.env
