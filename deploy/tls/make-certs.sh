#!/bin/sh
# Creates the TLS files of a Tablewire cluster with openssl: a certificate authority and one certificate per role.
#
#   deploy/tls/make-certs.sh FOLDER [HOST ...]       HOST: host names and addresses of the servers; localhost,
#                                                    127.0.0.1 and ::1 are always included
#   Environment variables with their defaults: DAYS=825 ROLES="owner processor cli etcd postgres"
#
# Writes ca.pem and ca.key, and ROLE.pem and ROLE.key with the common name tablewire-ROLE. Existing files are kept: to renew a
# certificate under the same authority, delete the role's two files. Keep ca.key away from the machines of the cluster. Private
# keys are readable by their owner only. docs/security.md explains which role may call which service.
set -eu
umask 077

if [ $# -lt 1 ]; then
    echo "usage: $0 FOLDER [HOST ...]" >&2
    exit 2
fi
folder=$1
shift
days=${DAYS:-825}
roles=${ROLES:-owner processor cli etcd postgres}
command -v openssl >/dev/null || { echo "$0: openssl is not installed" >&2; exit 1; }

names=DNS:localhost,IP:127.0.0.1,IP:::1
for host in "$@"; do
    case $host in
        *[!A-Za-z0-9.:*-]*) echo "$0: $host is neither a host name nor an address" >&2; exit 2 ;;
        *:*) names=$names,IP:$host ;;
        *[!0-9.]*) names=$names,DNS:$host ;;
        *) names=$names,IP:$host ;;
    esac
done

mkdir -p "$folder"
cd "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }

if [ ! -e ca.pem ] || [ ! -e ca.key ]; then
    if [ -e ca.pem ] || [ -e ca.key ]; then
        echo "$0: $folder has only one of ca.pem and ca.key; nothing was changed" >&2
        exit 1
    fi
    new_key "$work/ca.key"
    openssl req -x509 -new -sha256 -key "$work/ca.key" -days "$days" -subj "/CN=tablewire-authority" -out "$work/ca.pem" \
        -addext "keyUsage=critical,keyCertSign,cRLSign"
    mv "$work/ca.key" ca.key
    mv "$work/ca.pem" ca.pem
fi

for role in $roles; do
    if [ -e "$role.pem" ] && [ -e "$role.key" ]; then
        continue
    fi
    new_key "$work/$role.key"
    # Owners are clients of processors and of each other, and etcd members of each other: each certificate serves both purposes.
    printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
        "extendedKeyUsage=serverAuth,clientAuth" "subjectAltName=$names" >"$work/$role.ext"
    openssl req -new -sha256 -key "$work/$role.key" -subj "/CN=tablewire-$role" -out "$work/$role.csr"
    openssl x509 -req -sha256 -in "$work/$role.csr" -CA ca.pem -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" \
        -days "$days" -extfile "$work/$role.ext" -out "$work/$role.pem" 2>"$work/output" || { cat "$work/output" >&2; exit 1; }
    mv "$work/$role.key" "$role.key"
    mv "$work/$role.pem" "$role.pem"
done
chmod 644 ./*.pem
