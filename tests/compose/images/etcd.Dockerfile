# etcd with the layout of the official image: programs in /usr/local/bin, no entry point. The test copies the programs from the
# package of the extra `local` into the build context.
ARG BASE
FROM ${BASE}
COPY etcd/ /usr/local/bin/
CMD ["/usr/local/bin/etcd"]
