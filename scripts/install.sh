# shellcheck shell=bash
# Sourced by demo and test. Installs what they need besides Rust with apt, or says what is missing. Starts no system
# service and creates no Postgres cluster: the demo and the tests have their own servers.

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

need_cargo() {
    # The directory that rustup uses, for shells that do not have it on the PATH yet.
    have cargo || PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    have cargo || die "cargo is not installed. Rust comes with:
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    # Some crates need a C linker.
    have cc || packages+=(gcc libc6-dev)
}

have_postgres() {
    local dir
    # Distributions keep the server's programs out of the PATH.
    for dir in ${PATH//:/ } /usr/lib/postgresql/*/bin /usr/pgsql-*/bin; do
        [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && return
    done
    have pg_config && [ -x "$(pg_config --bindir)/initdb" ]
}

need_servers() {
    have_postgres || packages+=(postgresql)
    have psql || packages+=(postgresql-client)
    have redis-server || have valkey-server || packages+=(redis-server)
    have redis-cli || have valkey-cli || packages+=(redis-tools)
    # For the documents' commands, which run as tests.
    have curl || packages+=(curl)
    have openssl || packages+=(openssl)
    # As root, the servers run as another user.
    [ "$(id -u)" != 0 ] || have setpriv || packages+=(util-linux)
}

# For the status page. Not every distribution has a browser that apt alone can install, and most checks need none.
want_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        ! have "$name" || ! have chromedriver || return 0
    done
    (packages=(chromium chromium-driver) && install_packages) || say "continuing without a browser: install Chromium or Chrome to test the page"
}

# Checks the page for what keeps people out: contrast, names, roles. It is used by tests alone, and is not part of this repository.
want_axe() {
    local version=4.14.1 dir=${CARGO_TARGET_DIR:-target}/axe-core
    [ ! -s "$dir/axe.min.js" ] || return 0
    have npm && mkdir -p "$dir" && (cd "$dir" && npm pack --silent "axe-core@$version" >/dev/null && tar -xzf "axe-core-$version.tgz" --strip-components=1 package/axe.min.js) ||
        say "continuing without axe-core $version: install npm to check the page's accessibility"
}

# Tests the alerts, which rarely change.
want_promtool() {
    have promtool || (packages=(prometheus) && install_packages) ||
        say "continuing without promtool: install Prometheus to test the alerts"
}

# For a server with messages in a language other than English.
want_german() {
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    locale -a | grep -qix 'de_DE.utf8' ||
        { ([ -e /usr/share/i18n/locales/de_DE ] || { packages=(locales) && install_packages; }) &&
            "${root[@]}" localedef -i de_DE -f UTF-8 de_DE.UTF-8; } ||
        say "continuing without the locale de_DE.UTF-8: create it to test a server that speaks German"
}

# Runs the documents' programs in Python.
want_redis_py() {
    python3 -c 'import redis' 2>/dev/null || /usr/bin/python3 -c 'import redis' 2>/dev/null ||
        (packages=(python3-redis) && install_packages) ||
        say "continuing without redis-py: install it to run the programs in the documents"
}

# For tests of what a connection pooler breaks.
want_pgbouncer() {
    have pgbouncer || [ -x /usr/sbin/pgbouncer ] || (packages=(pgbouncer) && install_packages) ||
        say "continuing without PgBouncer: install it to test that poolers are recognised"
}

packages=()

# Installs everything in `packages`.
install_packages() {
    [ ${#packages[@]} -gt 0 ] || return 0
    local root=()
    if [ "$(id -u)" != 0 ]; then
        root=(sudo)
    fi
    if ! have apt-get || { [ ${#root[@]} -gt 0 ] && ! have sudo; }; then
        say "Programs are missing. Install the equivalents of these Debian packages, then run this again:"
        die "  ${packages[*]}"
    fi
    say "installing ${packages[*]} ..."
    # In a shell of its own, so that everything is restored however it ends.
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive bash -s -- "${packages[@]}" <<'INSTALL' || die "Installing ${packages[*]} failed, see above."
set -euo pipefail
policy=/usr/sbin/policy-rc.d
clusters=/etc/postgresql-common/createcluster.d/prefetchd.conf
ours=()
# Lists services that start with the system. Packages add theirs, and Prometheus would then listen on every interface.
enabled() {
    find /etc/systemd/system -path '*.wants/*' 2>/dev/null | grep -E '/(pgbouncer|postgresql|prometheus|redis|valkey|webdis)[^/]*$' | sort
}
before=$(enabled || true)
undo() {
    [ ${#ours[@]} -eq 0 ] || rm -f "${ours[@]}"
    comm -13 <(echo "$before") <(enabled || true) | xargs -r -d '\n' rm -f --
}
trap undo EXIT
trap 'exit 130' INT TERM HUP
# Every package calls this before it starts its service; 101 forbids it. An existing file is left alone.
if [ ! -e "$policy" ]; then
    ours+=("$policy")
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
if [ ! -e "$clusters" ]; then
    ours+=("$clusters")
    mkdir -p "${clusters%/*}"
    echo 'create_main_cluster = false' >"$clusters"
fi
log=$(mktemp)
ours+=("$log")
run() { "$@" >"$log" 2>&1 </dev/null || { status=$?; tail -n 40 "$log" >&2; return "$status"; }; }
run apt-get -o DPkg::Lock::Timeout=300 update
run apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
INSTALL
}
