# shellcheck shell=bash
# Sourced by demo and test: what they need besides Rust, installed where apt is the way, named where it is not.
# No system service is started, and no Postgres cluster is made: the servers of the demo and the tests are their own.

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

need_cargo() {
    # Where rustup puts it, for shells that have not read its lines yet.
    have cargo || PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    have cargo || die "cargo is not installed. Rust comes with:
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    # Some crates are built with a C linker.
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
    # Root's servers run as somebody else.
    [ "$(id -u)" != 0 ] || have setpriv || packages+=(util-linux)
}

# For the status page. Not every distribution has one that apt alone can install, and most checks need none.
want_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        ! have "$name" || ! have chromedriver || return 0
    done
    (packages=(chromium chromium-driver) && install_packages) || say "going on without a browser: install Chromium or Chrome to test the page"
}

# Tries the alerts, which hardly ever change.
want_promtool() {
    have promtool || (packages=(prometheus) && install_packages) ||
        say "going on without promtool: install Prometheus to test the alerts"
}

# A server that speaks another language than English.
want_german() {
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    locale -a | grep -qix 'de_DE.utf8' ||
        { ([ -e /usr/share/i18n/locales/de_DE ] || { packages=(locales) && install_packages; }) &&
            "${root[@]}" localedef -i de_DE -f UTF-8 de_DE.UTF-8; } ||
        say "going on without the locale de_DE.UTF-8: make it to test a server that speaks German"
}

# Stands between in tests of what a pooler breaks.
want_pgbouncer() {
    have pgbouncer || [ -x /usr/sbin/pgbouncer ] || (packages=(pgbouncer) && install_packages) ||
        say "going on without PgBouncer: install it to test that poolers are recognised"
}

packages=()

# Everything in `packages`.
install_packages() {
    [ ${#packages[@]} -gt 0 ] || return 0
    local root=()
    if [ "$(id -u)" != 0 ]; then
        root=(sudo)
    fi
    if ! have apt-get || { [ ${#root[@]} -gt 0 ] && ! have sudo; }; then
        say "Missing here. Install what these packages of Debian hold, then run this again:"
        die "  ${packages[*]}"
    fi
    say "installing ${packages[*]} ..."
    # In a shell of its own, so that whatever ends it puts everything back.
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive bash -s -- "${packages[@]}" <<'INSTALL' || die "Installing ${packages[*]} failed, see above."
set -euo pipefail
policy=/usr/sbin/policy-rc.d
clusters=/etc/postgresql-common/createcluster.d/prefetchd.conf
ours=()
# Servers that start with the system. Packages add theirs, and Prometheus would then listen on every interface.
enabled() {
    find /etc/systemd/system -path '*.wants/*' 2>/dev/null | grep -E '/(pgbouncer|postgresql|prometheus|redis|valkey)[^/]*$' | sort
}
before=$(enabled || true)
undo() {
    [ ${#ours[@]} -eq 0 ] || rm -f "${ours[@]}"
    comm -13 <(echo "$before") <(enabled || true) | xargs -r -d '\n' rm -f --
}
trap undo EXIT
trap 'exit 130' INT TERM HUP
# Asked by every package before it starts its service: 101 forbids it. One that is there already is left alone.
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
