# CPU:   docker build --tag qvera .
# CUDA:  docker build --tag qvera:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#            --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# BASE is a Debian or an Ubuntu whose python3 is 3.11 or newer. docs/containers.md says how to run the image.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
# g++ and python3-dev: Triton and DeepSpeed compile code when they are first used. Versions are not pinned, since Debian's
# mirrors keep only the newest of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/qvera
ENV PATH=/opt/qvera/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM python AS wheel
COPY . /src
RUN pip wheel --no-deps --wheel-dir /dist /src

FROM python
# torch comes first: its layer is the largest, and a change of qvera does not change it. The wheel's bounds hold for it too.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --index-url "${TORCH_INDEX}" torch
ARG EXTRAS=gguf,metrics,quickstart,serve,trl,vision
COPY --from=wheel /dist /dist
RUN pip install "$(echo /dist/qvera-*.whl)[${EXTRAS}]"

# Both directories can be written by every user, so that `docker run --user` works. Caches lie in HOME.
RUN useradd --uid 1001 --home-dir /cache --no-create-home qvera && mkdir --mode=1777 /cache /work
ENV HOME=/cache USER=qvera
VOLUME ["/cache", "/work"]
WORKDIR /work
USER 1001
ENTRYPOINT ["qvera"]
CMD ["--help"]
