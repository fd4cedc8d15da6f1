# shellcheck shell=bash disable=SC2034  # its constants are used by those who source it
# Shared by the scripts of images/: messages, the cache, and how an artifact is published in it.

shopt -s inherit_errexit

readonly SUITE=bookworm
readonly LINUX_SOURCE=linux-source-6.12

cache=${SOULBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/soulbox}

# Progress goes to stderr with the seconds since the script started; stdout carries results only.
log() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Prints the leading comment of the calling script.
usage() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p}' "$0"; }

have() { command -v "$1" >/dev/null; }

# A short key: the hash of everything on stdin.
key() { sha256sum | cut -c1-16; }

# Writes a folder's files and names to the disk.
sync_tree() { find "$1" \( -type f -o -type d \) -print0 | xargs -0 sync; }

# artifact KIND KEY RECIPE ARGS...: prints the folder that RECIPE made for this key.
#
# RECIPE gets an empty output folder, an empty work folder and ARGS. It works beside the
# destination; only a finished, fsynced folder is renamed into place, so a name in the cache
# is a complete artifact. One lock per kind keeps two builds apart.
artifact() {
    local kind=$1 key=$2 recipe=$3
    shift 3
    local dir=$cache/$kind dest=$cache/$kind/$key
    if [[ ! -d $dest || -n ${rebuild:-} ]]; then
        mkdir -p "$dir"
        (
            exec 9>"$dir/.lock"
            flock --nonblock 9 || { log "$kind: waiting for another build" && flock 9; }
            [[ ! -d $dest || -n ${rebuild:-} ]] || exit 0
            rm -rf "$dir"/.new.* # nobody else holds the lock: left by a build that died
            tmp=$(mktemp -d "$dir/.new.XXXXXX")
            trap 'rm -rf "$tmp"' EXIT
            trap 'exit 130' INT
            trap 'exit 143' TERM
            mkdir "$tmp/out" "$tmp/work"
            log "$kind $key: building"
            "$recipe" "$tmp/out" "$tmp/work" "$@" >&2 9>&-
            sync_tree "$tmp/out"
            [[ ! -d $dest ]] || mv -T "$dest" "$tmp/old"
            mv -T "$tmp/out" "$dest"
            sync "$dir"
            log "$kind $key: done"
        )
    fi
    touch "$dest" # the age that `collect` goes by is the time of last use
    echo "$dest"
}

# collect KIND KEEP: removes all but the KEEP last used artifacts of a kind.
collect() {
    local dir=$cache/$1 keep=$2 current old
    current=$(readlink "$dir/current" || true)
    find "$dir" -mindepth 1 -maxdepth 1 -type d ! -name '.*' -printf '%T@ %f\n' |
        sort -rn | tail -n "+$((keep + 1))" | cut -d' ' -f2 |
        while read -r old; do
            [[ $old == "$current" ]] || rm -rf "${dir:?}/$old"
        done
}
