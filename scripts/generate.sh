# shellcheck shell=bash
# Sourced by package and release.

# Writes the man pages, the completions and the licences of the crates into a directory: generate PROGRAM TRIPLE DIRECTORY
generate() {
    mkdir -p "$3"
    "$1" man-pages "$3"
    "$1" completions bash >"$3/prefetchd"
    "$1" completions zsh >"$3/_prefetchd"
    "$1" completions fish >"$3/prefetchd.fish"
    third_party "$2" >"$3/LICENSES-THIRD-PARTY"
}

# The licences of the crates in the program, each text once.
third_party() {
    local crates crate version licence dir dirs=() file sum registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
    local -A users=() texts=()
    # `NAME vVERSION LICENCE`. Our own crates have a path.
    crates=$(cargo tree --locked --offline --package prefetchd --edges normal,no-proc-macro --target "$1" --prefix none \
        --format '{p} {l}' | grep -v ' (/' | sort -u)
    echo "prefetchd contains the standard library of Rust (MIT OR Apache-2.0, https://www.rust-lang.org) and these crates from"
    echo "https://crates.io. The texts that they include follow."
    echo
    while read -r crate version licence; do
        echo "$crate ${version#v}: $licence"
        for dir in "$registry"/*/"$crate-${version#v}"; do
            [ -d "$dir" ] || die "The sources of $crate $version are not in $registry: cargo fetch --locked"
            dirs+=("$dir")
            break
        done
    done <<<"$crates"
    while read -r sum file; do
        dir=${file%/*}
        users[$sum]+="${users[$sum]:+, }${dir##*/}"
        texts[$sum]=$file
    done < <(find "${dirs[@]}" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' -o -iname 'copyright*' \
        -o -iname 'notice*' \) -print0 | sort -z | xargs -0 sha256sum)
    while IFS='|' read -r crates sum; do
        printf '\n\n%s\n%s\n\n' "$(printf -- '-%.0s' {1..100})" "$crates"
        cat "${texts[$sum]}"
    done < <(for sum in "${!users[@]}"; do echo "${users[$sum]}|$sum"; done | sort)
}
