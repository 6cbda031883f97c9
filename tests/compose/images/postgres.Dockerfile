# PostgreSQL with the behaviour of the official image that deploy/compose.yaml uses. The test copies the server from the package
# of the extra `local` into the build context.
ARG BASE
FROM ${BASE}
ENV PATH=/usr/local/pgsql/bin:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
RUN echo 'postgres:x:999:' >> /etc/group \
 && echo 'postgres:x:999:999:PostgreSQL:/var/lib/postgresql:/usr/sbin/nologin' >> /etc/passwd \
 && mkdir -p "$PGDATA" /run/postgresql /docker-entrypoint-initdb.d && chown 999:999 "$PGDATA" /run/postgresql \
 && chmod 1777 "$PGDATA" && chmod 3777 /run/postgresql
COPY pgsql/ /usr/local/pgsql/
COPY postgres_entrypoint.sh /usr/local/bin/
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["/bin/sh", "/usr/local/bin/postgres_entrypoint.sh"]
CMD ["postgres"]
