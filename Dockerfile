# syntax=docker/dockerfile:1

# Both stages are Debian 12, so that the binary finds the C library that it was linked with.
FROM rust:1-slim-bookworm AS build
ARG TARGETARCH
WORKDIR /src
COPY . .
# The binary is copied, because a cache mount is not part of the image. Each architecture has its own target directory:
# with one for both, the binary of the other might be copied.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,id=prefetchd-target-$TARGETARCH,target=/src/target \
    cargo build --release --locked && cp target/release/prefetchd /prefetchd

# No shell and no package manager. `nonroot` is uid and gid 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /prefetchd /usr/local/bin/prefetchd
EXPOSE 8787
# The only file that prefetchd writes is that of the admin token. The root file system may be read-only with a tmpfs
# there that belongs to UID 65532; without one, the token is in the user's home directory.
ENV RUNTIME_DIRECTORY=/run/prefetchd
# Healthy means that the process works (/healthz), not that it is ready (/readyz): what restarts unhealthy containers must
# not end a long first load, or a daemon that waits for a server. The address comes from the configuration or
# PREFETCHD__HTTP__LISTEN; the password files are not read.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/usr/local/bin/prefetchd", "status", "--live"]
ENTRYPOINT ["/usr/local/bin/prefetchd"]
CMD ["run"]
