# etcd laid out as in the official image: programs in /usr/local/bin, no entry point. The programs are those of the wheel that
# the extra `local` brings; the test puts them beside this file.
ARG BASE
FROM ${BASE}
COPY etcd/ /usr/local/bin/
CMD ["/usr/local/bin/etcd"]
