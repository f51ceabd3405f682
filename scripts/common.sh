#!/usr/bin/env bash
# What the other scripts share: the checkout's root, messages, rights of root and finding cargo.
# It is read by them with `source` and does nothing when run by itself.
set -euo pipefail

# The root of the checkout, whatever the current directory is.
# shellcheck disable=SC2034  # for those who read this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The last part of the running script's name, put before every message.
program=$(basename "$0")

# Tells something on stderr: stdout is for results.
say() {
    printf '%s: %s\n' "$program" "$*" >&2
}

# Tells what is wrong, and ends.
die() {
    say "$*"
    exit 1
}

# Prints the comment at the head of the running script, as its help.
print_help() {
    sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0"
}

# Quotes words as a POSIX shell reads them, and only where it is necessary.
quote() {
    local word separator=''
    for word in "$@"; do
        if [[ -z $word || $word == *[^A-Za-z0-9_./,:@%+=-]* ]]; then
            word="'${word//\'/\'\\\'\'}'"
        fi
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
}

# Runs a command as root: directly, or by sudo.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    else
        sudo -- "$@"
    fi
}

# Whether `as_root` can work. May ask for a password if there is a terminal to ask at.
can_be_root() {
    [[ $EUID -ne 0 ]] || return 0
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null && return 0
    [[ -t 0 ]] && sudo -v
}

# Whether /dev/fuse can be opened, which its mode alone does not tell: a container may forbid it.
can_open_fuse() {
    (: <>/dev/fuse) 2>/dev/null
}

# Makes /dev/fuse if it is missing; only root can. Whether it works is for `can_open_fuse` to say.
make_fuse() {
    [[ ! -c /dev/fuse ]] || return 0
    say "/dev/fuse is missing: loading the module fuse"
    as_root modprobe fuse || true
    [[ ! -c /dev/fuse ]] || return 0
    say "/dev/fuse is still missing: making it with mknod"
    as_root mknod -m 0666 /dev/fuse c 10 229 || true
}

# Administration tools are not on the path of an ordinary user of Debian.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# A shell that was started before rustup was installed does not have cargo on its path.
cargo_bin=${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}/bin
if [[ -x $cargo_bin/cargo && :$PATH: != *:$cargo_bin:* ]]; then
    PATH=$cargo_bin:$PATH
fi
export PATH
