#!/bin/sh
# restore.sh version 2: gets files back from RaidTape volumes without RaidTape.
#
#     sh restore.sh list                     all runs
#     sh restore.sh ls RUN [PATH]            what is in a folder (-r: and below it)
#     sh restore.sh get RUN PATH TO          a file or a folder, to the new name TO; "/" is all
#
#     -v DIR   a further volume; say it once for each. The script's own folder is always one.
#     -e       PATH is written as "ls" prints it: \0ooo is the byte with the octal number ooo
#     -k       keeps files that are incomplete or damaged, each named
#
# RUN is a number or "latest". It needs a POSIX shell, jq 1.6 or later, zstd and GNU coreutils;
# b3sum too, to check contents of a store whose hash is BLAKE3. It only reads the volumes and
# writes only TO, which must not exist, and a folder in $TMPDIR. Beside it, RESTORE.txt explains
# what it does. Ends with 0 if all went well, 1 if anything is missing or damaged, 2 if misused.

set -u
umask 077
LC_ALL=C
export LC_ALL
tab=$(printf '\t')
faults=0

say() {
    printf 'restore.sh: %s\n' "$*" >&2
}

fault() {
    faults=$((faults + 1))
    say "$@"
}

die() {
    say "$@"
    exit 1
}

misused() {
    say "$*; for help: sh restore.sh -h"
    exit 2
}

# Sets $decoded to the bytes that \0ooo escapes stand for, a newline at the end included.
decode() {
    case $1 in
        *\\*)
            decoded=$(printf '%b.' "$1")
            decoded=${decoded%.}
            ;;
        *) decoded=$1 ;;
    esac
}

# --- jq ---------------------------------------------------------------------------------------
#
# Names are any bytes, and jq knows only Unicode. So a path is used as a key: each name has a
# space before it, and of its bytes all but letters, digits and some signs are written \0ooo.
# Sorted as bytes, everything below a folder follows it at once. In jq, $t has the tables for it.

# shellcheck disable=SC2016
tables='
def oct: "\\0" + ([(. / 64 | floor), (. / 8 | floor) % 8, . % 8] | map(tostring) | join(""));
[range(256) | if . == 47 then " " elif . == 0 or . > 127 then oct else . as $b
    | ([$b] | implode | @uri) as $u | if ($u | length) == 1 then $u else $b | oct end end] as $byte
| ("0123456789ABCDEF" | explode | map([.] | implode)) as $x
| ("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/" | explode) as $c
| {byte: $byte,
   hex: (reduce range(256) as $b ({}; .[$x[($b / 16 | floor)] + $x[$b % 16]] = $byte[$b])),
   b64: (reduce range(64) as $i ([range(128) | null]; .[$c[$i]] = $i))}'

# shellcheck disable=SC2016
lib='
def int: if type == "number" and . == floor and . > -9e15 and . < 9e15 then .
    else error("no whole number, or one too large") end;
def count: int | if . >= 0 then . else error("below zero") end;
def date: int | . as $s | try todate catch ($s | tostring);
def oct: "\\0" + ([(. / 64 | floor), (. / 8 | floor) % 8, . % 8] | map(tostring) | join(""));
def esc: if . == "" then "" else (@uri | split("%")) as $p
    | if ($p | length) == 1 then $p[0]
      else $p[0] + ($p[1:] | map($t.hex[.[0:2]] + .[2:]) | join("")) end end;
def unb64: [explode[] | select(. != 61) | $t.b64[.] // error("no base64")] as $d
    | [range(0; $d | length; 4) as $i | $d[$i:$i + 4] as $q | ($q | length) as $n
       | ($q[0] * 262144 + ($q[1] // 0) * 4096 + ($q[2] // 0) * 64 + ($q[3] // 0)) as $w
       | ($w / 65536 | floor),
         (if $n > 2 then ($w / 256 | floor) % 256 else empty end),
         (if $n > 3 then $w % 256 else empty end)]
    | map($t.byte[.]) | join("");
def name($k): if (.[$k] | type) == "string" then .[$k] | esc
    elif (.[$k + "_b64"] | type) == "string" then .[$k + "_b64"] | unb64
    else error("no " + $k) end;
def key($k): name($k) as $n | if $n == "" then "" else " " + $n end;
def slashes: split(" ") | join("/");
def is_plain: (contains("\\000") or contains("\\001") or contains("\\002") or contains("\\003")
    or contains("\\0134") or contains("\\0177") or contains("\\0302")) | not;
def shown($path): if ($path | type) == "string" and is_plain then $path
    elif ($path | type) == "string" then
        $path | explode | map(if . < 32 or . == 92 or . == 127 then oct
            elif . >= 128 and . < 160 then "\\0302" + oct else [.] | implode end) | join("")
    elif . == "" then ""
    else (ltrimstr(" ") | slashes | split("\\0")) as $p
        | $p[0] + ($p[1:] | map((.[0:3] | explode | map(. - 48)) as $o
            | ($o[0] * 64 + $o[1] * 8 + $o[2]) as $b
            | (if $b > 31 and $b < 127 and $b != 92 then [$b] | implode
               else "\\0" + .[0:3] end) + .[3:]) | join("")) end;
def line: map(tostring) | join("\t");
def hash: if type == "string" and length == 64 and @uri == . and (contains(".") | not) then .
    else error("no hash") end;
'

# The first lines of all manifests, each after volume and file name, to a table of runs.
# shellcheck disable=SC2016
runs_of='
[inputs | split("\t") | select(length > 2) | .[0] as $volume | .[1] as $file
 | .[2:] | join("\t")
 | try (fromjson | select(.op == "run")
    | {volume: $volume, run: (.run | count), uuid: (.uuid | strings),
       algo: (.hash_algo | strings | esc),
       source: key("source"), shown: (key("source") as $k | .source as $s | $k | shown($s)),
       time: (.started[0] | date), tags: [.tags[]? | strings],
       comment: (.comment // "" | strings)}
    | .padded = ("0000000" + (.run | tostring))[-8:]
    | select($file == "run-" + .padded + ".jsonl.zst")) catch empty]
| group_by(.run)[] | .[0] as $r
| [$r.run, $r.padded, (map(.uuid) | unique | length), (map(.volume) | join(" ")), $r.algo,
   "@" + $r.source, $r.time, $r.shown,
   (($r.tags | map("[" + . + "] ") | join("")) + $r.comment as $c | $c | shown($c))]
| line'

# A manifest to lines of key, sequence number and content, only what concerns $want. The last
# line says whether the manifest was whole.
# shellcheck disable=SC2016
extract='
def content: if .op != "put" then
        {op} + (if .op == "link" then {version: .version | int} else {} end)
    else {op, kind, version: .version | int, mode: ((.mode | count) % 4096),
        uid: .uid | count, gid: .gid | count, size: .size | count, mtime: .mtime | map(int),
        nlink: .nlink | int, rdev: .rdev | count, hash, extents,
        more: (has("xattrs") or has("flags")),
        target: (if .kind == "symlink" then name("target") | slashes else "" end)} end
    | . + {path: null};
def record($seq): if .op | . == "put" or . == "link" or . == "delete" or . == "empty" then
        .path as $path | key("path") as $k
        | if $k == $want or ($k | startswith($want + " ")) then
              $k + "\t" + $seq + "\t" + (content + {path: $path} | tojson)
          elif (.op | . == "delete" or . == "empty") and ($want | startswith($k + " ")) then
              $k + "\t" + $seq + "\t" + ({op} | tojson)
          else null end
    elif .op == "run" or .op == "owner" or .op == "problem" then null
    else error("unknown line") end;
foreach (inputs, {"op": "eof"}) as $l ({n: 0, bad: 0, end: false};
    .out = null
    | if $l.op == "eof" then .
      elif $l.op == "end" then .end = ($l.changes == .n - 1)
      else .n += 1 | (.n | tostring) as $n
        | ($run + ("000000000" + $n)[-10:]) as $seq
        | (try ($l | record($seq)) catch false) as $out
        | if $out == false then .bad += 1 else .out = $out end end;
    if $l.op == "eof" then "END\t" + (if .end and .bad == 0 then "whole" else "broken" end)
    else .out // empty end)'

# What the sorted lines come to: each path that is there after the last of them.
# shellcheck disable=SC2016
merge='
def flush: .out = null | if .k == null then . else .k as $k
    | until((.stack | length) == 0 or ((.stack[-1][0] + " ") as $it | $k | startswith($it));
        .stack |= .[:-1])
    | (if (.stack | length) == 0 then "" else .stack[-1][1] end) as $above
    | (if .last != null and .at > $above then .out = $k + "\t" + .last else . end)
    | if .kill > $above then .stack += [[$k, .kill]] else . end end;
foreach (inputs, null) as $l ({k: null, stack: []};
    ($l // "END" | split("\t")) as $f
    | if $f[0] == "END" and $l != null then .out = null
      elif $f[0] == .k and $l != null then .out = null
      else flush | .k = (if $l == null then null else $f[0] end)
          | .last = null | .at = "" | .kill = "" end
    | if $l == null or $f[0] == "END" then .
      elif $f[2] | startswith("{\"op\":\"delete\"") then .kill = $f[1] | .last = null
      elif $f[2] | startswith("{\"op\":\"empty\"") then .kill = $f[1]
      else .last = $f[2] | .at = $f[1] end;
    .out // empty)'

# Entries in the order of their paths, as objects: names checked, links resolved.
# shellcheck disable=SC2016
plan='
def is_safe: if contains(" .") or contains("  ") or endswith(" ") or contains("\\0000") then
        split(" ")[1:] | all(.[]; . != "" and . != "." and . != ".."
            and (contains("\\0000") | not))
    else true end;
def times: if .[0] < 0 and .[1] > 0 then "-\(-1 - .[0])." + ("00000000\(1e9 - .[1])")[-9:]
    else "\(.[0])." + ("00000000\(.[1])")[-9:] end;
def checked: (try (
        if .kind == "file" then
            .hash |= (if . == null then . else hash end)
            | .extents |= map([(.[0] | if . == null then . else hash end),
                (.[1] | count), (.[2] | count)])
            | if (.extents | map(.[2]) | add // 0) == .size then .
              else error("its pieces are not as long as it is") end
        elif .kind | . == "dir" or . == "symlink" or . == "fifo" or . == "socket"
            or . == "char-device" or . == "block-device" then .
        else error("unknown kind of entry") end) catch {bad: .});
foreach inputs as $l ({n: 0, dirs: [], seen: {}};
    ($l | split("\t")) as $f | $f[0] as $key | ($f[1] | fromjson) as $own
    | ($key[($want | length):]) as $rel
    | .n += 1 | .n as $before
    | ($own | if .op == "link" then $puts[(.version | tostring)] as $put
        | if $put == null then {bad: "it is a further name of a file whose entry is in no manifest"}
          else $put + {linked: true} end else . end) as $e
    | ($e | if .bad then . else . as $all | checked | if .bad then . else $all + . end end) as $e
    | until((.dirs | length) == 0 or ((.dirs[-1] + " ") as $it | $key | startswith($it));
        .dirs |= .[:-1])
    | ($key | split(" ")[:-1] | join(" ")) as $parent
    | (if $e.bad then $e
       elif $rel | is_safe | not then {bad: "its name could lead out of the folder"}
       elif .leaf != null and (.leaf as $it | $key | startswith($it))
       then {bad: "what should be its folder is none"}
       else $e end) as $e
    # Folders whose own entries are in a manifest that is lost.
    | (if $e.bad or $rel == "" or .dirs[-1] == $parent then []
       else (.dirs[-1] // "" | length) as $known | (.dirs == []) as $all
           | ($rel | split(" ")[1:-1]) as $names
           | [range(0; ($names | length) + 1) as $i | $names[:$i] | map(" " + .) | join("")
              | select($all or ($want + . | length) > $known)
              | {kind: "dir", mode: 448, size: 0, rdev: 0, target: "", rel: ., key: ($want + .),
                 uid: $e.uid, gid: $e.gid, mtime: $e.mtime}] end) as $made
    | .dirs += ($made | map(.key)) | .n += ($made | length)
    | ($e.version | tostring) as $v
    | (if $e.bad or $e.kind == "dir" then $e
       elif ($e.nlink // 1) > 1 or $e.linked or $links[$v] then
           if .seen[$v] then $e + {kind: "hard", is: $e.kind, target: ("@" + .seen[$v])} else $e end
       else $e end) as $e
    | (if $e.bad then . elif $e.kind == "dir" then .dirs += [$key] else .leaf = $key + " " end)
    | (if ($e.bad | not) and $e.kind != "dir" and (.seen[$v] | not)
           and (($e.nlink // 1) > 1 or $e.linked or $links[$v])
       then .seen[$v] = ($rel | slashes) else . end)
    | [($made + [$e + {rel: $rel, key: $key, path: $own.path}]) | to_entries[]
       | (.value + {n: ($before + .key)})
       | (.path as $path | .key | shown($path)) as $shown
       | .shown = $shown | .rel |= "@" + slashes | .time = ((.mtime // [0, 0]) | times)] as $out
    | .out = $out;
    .out[])'

# A block's frames and the pieces that are wanted of it, to windows of at most 64 frames: which
# frames to decode, and which bytes of them go where. A frame is at most $longest bytes.
# shellcheck disable=SC2016
windows='
[foreach .frames[] as $f ({s: 0, p: 0, sl: 0, pl: 0};
    .s += .sl | .p += .pl | .c = $f[0] | .sl = ($f[1] | count) | .pl = ($f[2] | count)
    | if (.c == "raw" or .c == "zstd") and .pl <= $longest then .
      else error("no frame") end)] as $frames
| ($frames | length) as $n
| (if $n == 0 then 0 else $frames[-1] | .p + .pl end) as $plain
| [$pieces | split("\n")[] | select(. != "") | split("\t")
   | {at: (.[0] | tonumber), len: (.[1] | tonumber), to: (.[2] | tonumber), n: .[3], rel: .[4]}]
| (.[] | select(.at + .len > $plain) | ["X", .n] | line),
  (map(select(.at + .len <= $plain)) as $all
   | range(0; $n; 64) as $i | $frames[$i:$i + 64] as $some
   | $some[0].p as $a | ($some[-1] | .p + .pl) as $b
   | [$all[] | select(.at < $b and .at + .len > $a)
      | ([.at, $a] | max) as $from | ([.at + .len, $b] | min) as $upto
      | {from: $from, upto: $upto, to: (.to + $from - .at), n: .n, rel: .rel}]
   | select(length > 0) | . as $parts
   | (map(.from) | min) as $lo | (map(.upto) | max) as $hi
   | [$some[] | select(.p < $hi and .p + .pl > $lo)] | .[0].p as $base
   | "W",
     ((reduce .[] as $f ([]; if length > 0 and .[-1][-1].c == $f.c then .[-1] += [$f]
          else . + [[$f]] end)) | .[]
      | ["G", .[0].c, .[0].s, (map(.sl) | add), (map(.pl) | add),
         (map("\(.sl):\(.pl)") | join(" "))] | line),
     ($parts[] | ["P", .from - $base, .upto - .from, .to, .n, .rel] | line))'

q() {
    # The program is the last argument.
    jq --argjson t "$tables" "$@"
}

# --- Volumes and runs -------------------------------------------------------------------------

start() {
    for tool in jq zstd dd sort mktemp mkdir rm ln chmod chown touch truncate stat base64 head \
        tail tac cat id readlink wc; do
        command -v "$tool" >/dev/null || die "needs the program '$tool', which is not here"
    done
    tables=$(jq -cn "$tables") || die "jq 1.6 or later is needed"
    tmp=$(mktemp -d "${TMPDIR:-/tmp}/restore.XXXXXX") || exit 1
    trap 'rm -rf -- "$tmp"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    mkdir "$tmp/volume" "$tmp/bad"
    count=0
}

# Volumes are kept as links with numbers for names.
add_volume() {
    dir=$(cd -- "$1" 2>/dev/null && pwd -P && printf .) || die "there is no folder '$1'"
    dir=${dir%??}
    if [ ! -d "$dir/chunks" ] || [ ! -d "$dir/manifests" ]; then
        return 1
    fi
    count=$((count + 1))
    ln -s -- "$dir" "$tmp/volume/$count"
}

volume_path() {
    readlink -n -- "$tmp/volume/$1"
}

# All runs of all volumes, to $tmp/runs.
read_runs() {
    volume=0
    while [ "$volume" -lt "$count" ]; do
        volume=$((volume + 1))
        for file in "$tmp/volume/$volume/manifests"/run-*.jsonl.zst; do
            [ -f "$file" ] || continue
            printf '%s\t%s\t' "$volume" "${file##*/}"
            zstd -dcq -- "$file" 2>/dev/null | head -n 1
            printf '\n'
        done
    done >"$tmp/heads"
    q -Rnr "$lib $runs_of" "$tmp/heads" >"$tmp/runs" || die "the manifests cannot be understood"
    [ -s "$tmp/runs" ] || die "no volume has a manifest that can be read"
}

# Sets $run, $source_key (and so on) for the run of this name.
find_run() {
    run=''
    while IFS=$tab read -r number padded same volumes algo key time shown note; do
        if [ "$number" = "$1" ] || [ "$1" = latest ]; then
            run=$number run_algo=$algo source_key=$key run_source=$shown
        fi
    done <"$tmp/runs"
    [ -n "$run" ] || die "no run '$1' on these volumes; 'list' shows all"
}

# Sets $want to the key of a path as the user gives it.
find_path() {
    path=$1
    if [ "$escaped" = 1 ]; then
        decode "$path"
        path=$decoded
    fi
    # shellcheck disable=SC2016
    want=$(printf %s "$path" | base64 | q -Rrs --arg source "${source_key#@}" "$lib"'
        def tidy: split(" ") | map(select(. != "" and . != ".")) | map(" " + .) | join("");
        (split("\n") | join("") | if . == "" then "" else unb64 end) as $path
        | ($path | tidy) as $k | ($source | tidy) as $s
        | if $path | split(" ") | any(.[]; . == "..") then error("..")
          elif ($path | startswith(" ")) and ($k == $s or ($k | startswith($s + " ")))
          then $k[($s | length):] else $k end' 2>/dev/null) || misused "a path has no '..'"
}

# The entry lines of $want in run $run, sorted by path, to $tmp/merged.
replay() {
    : >"$tmp/all"
    used=''
    expected=0
    while IFS=$tab read -r number padded same volumes algo key time shown note; do
        [ "$number" -le "$run" ] || break
        expected=$((expected + 1))
        while [ "$expected" -lt "$number" ]; do
            fault "run $expected has a readable manifest on none of these volumes: if it was a" \
                "run of this source, what it changed is not known; add volumes with -v"
            expected=$((expected + 1))
        done
        [ "$key" = "$source_key" ] || continue
        if [ "$same" != 1 ]; then
            for volume in $volumes; do
                say "run $number: $(volume_path "$volume")/manifests/run-$padded.jsonl.zst"
            done
            die "two different runs have the number $number (see their first lines): one of them" \
                "was never finished, or belongs to another store; move that one away"
        fi
        is_whole=0
        for volume in $volumes; do
            file=$tmp/volume/$volume/manifests/run-$padded.jsonl.zst
            zstd -dcq -- "$file" 2>/dev/null |
                q -nr --arg want "$want" --arg run "$padded" "$lib $extract" \
                    >"$tmp/one" 2>/dev/null
            if [ "$(tail -n 1 "$tmp/one")" = "END${tab}whole" ]; then
                is_whole=1
                break
            fi
            say "$(volume_path "$volume")/manifests/run-$padded.jsonl.zst is damaged"
        done
        [ "$is_whole" = 1 ] ||
            fault "the manifest of run $number is damaged: using what can be read of it"
        cat "$tmp/one" >>"$tmp/all"
        used="$used $volume:$padded"
    done <"$tmp/runs"
    sort -T "$tmp" -o "$tmp/all" "$tmp/all" || die "sorting failed"
    q -Rnr "$lib $merge" "$tmp/all" >"$tmp/merged" || die "the manifests cannot be understood"
    rm -f "$tmp/all" "$tmp/one"
    [ -s "$tmp/merged" ] || die "run $run has no such path; 'ls $run' shows what it has"

    # Entries of files that got a further name later are anywhere.
    # shellcheck disable=SC2016
    q -Rnc 'reduce (inputs | split("\t")[1] | fromjson | select(.op == "link")) as $e ({};
        .[$e.version | tostring] = true)' "$tmp/merged" >"$tmp/links" || die "jq failed"
    : >"$tmp/puts"
    if [ "$(head -c 3 "$tmp/links")" != '{}' ]; then
        for it in $used; do
            file=$tmp/volume/${it%:*}/manifests/run-${it#*:}.jsonl.zst
            # shellcheck disable=SC2016
            zstd -dcq -- "$file" 2>/dev/null |
                q -nc --slurpfile links "$tmp/links" --arg want '' --arg run '' "$lib
                    ${extract%%def record*}"'
                    inputs | select(.op == "put" and $links[0][.version | tostring])
                    | try content catch empty' 2>/dev/null >>"$tmp/puts"
        done
    fi
    # shellcheck disable=SC2016
    jq -nc 'reduce inputs as $e ({}; .[$e.version | tostring] = $e)' "$tmp/puts" >"$tmp/put"
    # shellcheck disable=SC2016
    q -Rnc --slurpfile l "$tmp/links" --slurpfile p "$tmp/put" --arg want "$want" \
        "$lib "'$l[0] as $links | $p[0] as $puts | '"$plan" "$tmp/merged" >"$tmp/plan" ||
        die "the manifests cannot be understood"
    rm -f "$tmp/merged" "$tmp/puts" "$tmp/put"
}

list() {
    while IFS=$tab read -r number padded same volumes algo key time shown note; do
        printf '%8s  %s  %s  %s\n' "$number" "$time" "$shown" "$note"
        [ "$same" = 1 ] || fault "run $number: the volumes have different runs of this number"
    done <"$tmp/runs"
}

ls_path() {
    replay
    # shellcheck disable=SC2016
    q -r --argjson all "$recursive" "$lib"'
        (.rel[1:] | split("/") | length - 1) as $depth
        | select(.n == 1 and .kind != "dir" or $all == 1 and $depth > 0 or $depth == 1)
        | (.mode // 0) as $m
        | if .bad then "?\t0\t0\t0\t0\t0\t\(.shown) (\(.bad))"
          else [.is // .kind, ([512, 64, 8, 1] | map(($m / . | floor) % 8 | tostring) | join("")),
            .uid, .gid, .size, (.mtime[0] | date), .shown]
            | map(tostring) | join("\t") end' "$tmp/plan" >"$tmp/shown" || die "jq failed"
    while IFS=$tab read -r kind mode uid gid size time shown; do
        printf '%-7.7s %s %5s %5s %12s %s  %s\n' "$kind" "$mode" "$uid" "$gid" "$size" "$time" \
            "$shown"
    done <"$tmp/shown"
}

# --- Contents ---------------------------------------------------------------------------------

# Notes that an entry could not be got; the reason of the first trouble stays.
spoil() {
    [ -e "$tmp/bad/$1" ] || printf '%s\n' "$2" >"$tmp/bad/$1"
}

# Sets $found to the hash of what comes in; fails if there is no program for it.
digest() {
    found=''
    case $run_algo in
        sha256) set -- sha256sum ;;
        blake3) set -- b3sum ;;
        *) return 1 ;;
    esac
    command -v "$1" >/dev/null || return 1
    found=$("$1") || return 1
    found=${found%% *}
}

copy_range() {
    dd if="$1" bs=64K iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none
}

# Follows a plan of windows for the block file $1. With $2 = 1 it ends with 1 at the first damage,
# with 0 it takes what it can get and spoils the files that have their bytes there.
write_pieces() {
    holes='' window_end=0
    while IFS=$tab read -r what a b c d e; do
        case $what in
            W)
                : >"$tmp/window"
                holes='' window_end=0
                ;;
            G)
                decode_group "$1" "$a" "$b" "$c" "$d" "$e" || [ "$2" = 0 ] || return 1
                ;;
            P)
                for hole in $holes; do
                    if [ "$a" -lt "${hole#*:}" ] && [ $((a + b)) -gt "${hole%:*}" ]; then
                        spoil "$d" "block $block is damaged where it lies"
                    fi
                done
                [ ! -e "$tmp/bad/$d" ] || [ "$keep" = 1 ] || continue
                decode "${e#@}"
                dd if="$tmp/window" of="$to$decoded" bs=64K conv=notrunc status=none \
                    iflag=skip_bytes,count_bytes oflag=seek_bytes skip="$a" count="$b" \
                    seek="$c" 2>"$tmp/error" || spoil "$d" "writing it failed: $(cat "$tmp/error")"
                ;;
            X)
                spoil "$a" "block $block is shorter than the manifest says"
                ;;
        esac
    done <"$tmp/windows"
}

# Appends frames of one codec to the window. If they do not come out as long as they are, each is
# taken by itself, and the range of a bad one is noted.
decode_group() {
    start=$window_end
    window_end=$((start + $5))
    if [ "$2" = raw ]; then
        copy_range "$1" "$3" "$4" 2>/dev/null >>"$tmp/window"
    else
        copy_range "$1" "$3" "$4" 2>/dev/null | zstd -dcq 2>/dev/null |
            head -c "$(($5 + 1))" >>"$tmp/window"
    fi
    [ "$(stat -c %s "$tmp/window")" != "$window_end" ] || return 0
    truncate -s "$start" "$tmp/window"
    stored=$3
    for frame in $6; do
        if [ "$2" = raw ]; then
            copy_range "$1" "$stored" "${frame%:*}" 2>/dev/null >>"$tmp/window"
        else
            copy_range "$1" "$stored" "${frame%:*}" 2>/dev/null | zstd -dcq 2>/dev/null |
                head -c "$((${frame#*:} + 1))" >"$tmp/frame"
            [ "$(stat -c %s "$tmp/frame")" != "${frame#*:}" ] || cat "$tmp/frame" >>"$tmp/window"
        fi
        stored=$((stored + ${frame%:*}))
        end=$((start + ${frame#*:}))
        if [ "$(stat -c %s "$tmp/window")" != "$end" ]; then
            holes="$holes $start:$end"
            truncate -s "$end" "$tmp/window"
        fi
        start=$end
    done
    return 1
}

# The plan of windows for block $block, of which the pieces in $tmp/pieces_here are wanted.
plan_windows() {
    volume=0
    while [ "$volume" -lt "$count" ]; do
        volume=$((volume + 1))
        for meta in "$tmp/volume/$volume/meta/$block.meta.json.zst" \
            "$tmp/volume/$volume/meta/$block.meta.json"; do
            [ -f "$meta" ] || continue
            case $meta in
                *.zst) zstd -dcq -- "$meta" 2>/dev/null ;;
                *) cat -- "$meta" ;;
            esac | q -r --rawfile pieces "$tmp/pieces_here" --argjson longest 1048576 \
                "$lib $windows" \
                >"$tmp/windows" 2>/dev/null && [ -s "$tmp/windows" ] && return 0
            say "the meta of block $block on $(volume_path "$volume") is damaged"
        done
    done
    # Without a meta: all frames are zstd if they decode so, or else it may be all raw, which only
    # a hash can confirm.
    file=$1
    stored=$(stat -L -c %s "$file")
    if zstd -tq 2>/dev/null <"$file"; then
        frame="[\"zstd\",$stored,$(zstd -dcq <"$file" | wc -c)]"
    elif digest </dev/null >/dev/null; then
        frame="[\"raw\",$stored,$stored]"
    else
        return 1
    fi
    say "block $block has no meta: trying to do without"
    printf '{"frames":[%s]}\n' "$frame" |
        q -r --rawfile pieces "$tmp/pieces_here" --argjson longest 9e15 \
            "$lib $windows" >"$tmp/windows"
}

# Gets the pieces of one block into their files.
get_block() {
    damaged='' first=''
    xx=${block%"${block#??}"}
    yy=${block#??}
    yy=${yy%"${yy#??}"}
    volume=0
    while [ "$volume" -lt "$count" ]; do
        volume=$((volume + 1))
        copy=$volume
        file=$tmp/volume/$volume/chunks/$xx/$yy/$block
        [ -f "$file" ] || continue
        first=${first:-$file}
        is_planned=1
        plan_windows "$file" || is_planned=0
        volume=$copy
        digest <"$file" || found=''
        if [ "$is_planned" = 1 ] && [ "${found:-$block}" = "$block" ] &&
            write_pieces "$file" 1; then
            for copy in $damaged; do
                say "block $block on $(volume_path "$copy") is damaged; another copy is used"
            done
            return 0
        fi
        damaged="$damaged $copy"
    done
    if [ -z "$first" ]; then
        fault "block $block is on none of these volumes; add the volume that has it with -v"
        reason="block $block is missing"
    elif [ "$is_planned" = 0 ]; then
        fault "block $block has no meta that can be read, and its frames cannot be guessed"
        reason="block $block has no meta"
    else
        for copy in $damaged; do
            fault "block $block on $(volume_path "$copy") is damaged"
        done
        write_pieces "$first" 0
        return 0
    fi
    while IFS=$tab read -r _ _ _ spoilt _; do
        spoil "$spoilt" "$reason"
    done <"$tmp/pieces_here"
}

# All pieces of all files, block by block, so that each block is read once.
get_contents() {
    # shellcheck disable=SC2016
    jq -r 'select(.kind == "file" and (.bad | not)) | .n as $n | .rel as $rel
        | foreach .extents[] as $x ({to: 0, len: 0}; .to += .len | .len = $x[2];
            if $x[0] == null or $x[2] == 0 then empty
            else [$x[0], ("00000000000000" + ($x[1] | tostring))[-15:], ($x[1] | tostring),
                ($x[2] | tostring), (.to | tostring), ($n | tostring), $rel] | join("\t") end)' \
        "$tmp/plan" >"$tmp/pieces" || die "jq failed"
    sort -T "$tmp" -o "$tmp/pieces" "$tmp/pieces" || die "sorting failed"
    printf '\n' >>"$tmp/pieces"
    block=''
    : >"$tmp/pieces_here"
    while IFS=$tab read -r name _ at len to_at n rel <&3; do
        if [ "$name" != "$block" ]; then
            [ -z "$block" ] || get_block
            block=$name
            : >"$tmp/pieces_here"
        fi
        printf '%s\t%s\t%s\t%s\t%s\n' "$at" "$len" "$to_at" "$n" "$rel" >>"$tmp/pieces_here"
    done 3<"$tmp/pieces"
}

# Prints a number as eight bytes, the lowest first.
le8() {
    number=$1 bytes=''
    for _ in 1 2 3 4 5 6 7 8; do
        bytes=$bytes$(printf '\\0%03o' $((number & 255)))
        number=$((number >> 8))
    done
    printf '%b' "$bytes"
}

# The hash of a file as the manifest means it: with holes, of each stretch of data with its place.
digest_of() {
    if [ "$2" = - ]; then
        digest <"$1"
        return
    fi
    # Its own process, as the end of a pipe, would take $found with it.
    for_holes=$({
        for stretch in $2; do
            [ "$stretch" != none ] || continue
            le8 "${stretch%:*}"
            le8 "${stretch#*:}"
            copy_range "$1" "${stretch%:*}" "${stretch#*:}"
        done
        le8 "$3"
    } | (digest && printf %s "$found")) || return 1
    found=$for_holes
}

# --- Entries ----------------------------------------------------------------------------------

# Owner, mode and time of what has just been made; a link's own, not those of where it leads.
dress() {
    if [ "$is_root" = 1 ]; then
        chown -h "$uid:$gid" "$name" || fault "$shown: its owner could not be set"
    fi
    if [ "$kind" != symlink ]; then
        chmod "$mode" "$name" || fault "$shown: its mode could not be set"
    fi
    touch -h -d "@$time" "$name" || fault "$shown: its time could not be set"
}

make_special() {
    case $kind in
        symlink)
            decode "${target#@}"
            ln -s -- "$decoded" "$name"
            ;;
        fifo) mkfifo -- "$name" ;;
        char-device | block-device)
            letter=b
            [ "$kind" = block-device ] || letter=c
            mknod -- "$name" "$letter" $(((rdev >> 8 & 4095) | (rdev >> 32 & 4294963200))) \
                $(((rdev & 255) | (rdev >> 12 & 4294967040)))
            ;;
    esac
}

finish_file() {
    if [ -e "$tmp/bad/$n" ]; then
        reason=$(cat "$tmp/bad/$n")
        if [ "$keep" = 0 ]; then
            rm -f -- "$name"
            fault "$shown: not restored: $reason"
            return
        fi
        fault "$shown: kept, though incomplete: $reason"
    elif [ "$hash" = - ]; then
        unchecked=$((unchecked + 1))
    elif digest_of "$name" "$stretches" "$size"; then
        if [ "$found" != "$hash" ]; then
            reason='its content does not match its hash'
            spoil "$n" "$reason"
            if [ "$keep" = 0 ]; then
                rm -f -- "$name"
                fault "$shown: not restored: $reason"
                return
            fi
            fault "$shown: kept, though damaged: $reason"
        fi
    else
        unchecked=$((unchecked + 1))
    fi
    files=$((files + 1))
    dress
}

# Reads the next line of $tmp/entries, or of what lies at descriptor 3 instead.
next_entry() {
    IFS=$tab read -r kind n mode uid gid size time hash rdev target stretches more rel shown <&3
}

get() {
    [ -n "$to" ] || misused "TO is empty"
    case $to in
        /*) ;;
        *) to=./$to ;;
    esac
    if [ -e "$to" ] || [ -L "$to" ]; then
        misused "'$to' is there already: give a new name, nothing is ever overwritten"
    fi
    replay
    # Columns are never empty: the shell takes several tabs for one.
    # shellcheck disable=SC2016
    jq -r 'def stretches: if .kind != "file" or (any(.extents[]; .[0] == null) | not) then "-"
        else [foreach .extents[] as $x ({at: 0, len: 0}; .at += .len | .len = $x[2];
                if $x[0] == null or $x[2] == 0 then empty else [.at, .len] end)]
            | reduce .[] as $s ([]; if length > 0 and (.[-1] | .[0] + .[1]) == $s[0]
                then .[-1][1] += $s[1] else . + [$s] end)
            | if length == 0 then "none" else map("\(.[0]):\(.[1])") | join(" ") end end;
        ([512, 64, 8, 1] as $by | (.mode // 0) as $m
            | $by | map(($m / . | floor) % 8 | tostring) | join("")) as $mode
        | if .bad then ["bad", .n, 0, 0, 0, 0, 0, "-", 0, "-", "-", 0, .rel, .bad + "\t" + .shown]
          else [.kind, .n, "0" + $mode, .uid, .gid, .size, .time, .hash // "-", .rdev,
            (if .kind == "hard" then .target else "@" + .target end), stretches,
            (if .more then 1 else 0 end), .rel, .shown] end
        | map(tostring) | join("\t")' "$tmp/plan" >"$tmp/entries" || die "jq failed"

    is_root=0
    [ "$(id -u)" != 0 ] || is_root=1
    files=0 others=0 unchecked=0 with_more=0 sockets=0
    # Folders and empty files first: there is no link yet that a path could go through. Nothing
    # that is there is opened.
    set -C
    while next_entry; do
        case $kind in
            dir | file) ;;
            *) continue ;;
        esac
        decode "${rel#@}"
        name=$to$decoded
        if [ "$kind" = dir ]; then
            mkdir -- "$name" || spoil "$n" "its folder could not be made"
        elif command : 2>/dev/null >"$name"; then
            if [ "$stretches" != - ] || [ "$keep" = 1 ]; then
                truncate -s "$size" -- "$name" || spoil "$n" "there is no room for it"
            fi
        else
            spoil "$n" "it could not be made"
        fi
        [ -e "$tmp/bad/1" ] && [ "$n" = 1 ] && die "$to: $(cat "$tmp/bad/1")"
    done 3<"$tmp/entries"
    set +C
    get_contents
    while next_entry; do
        decode "${rel#@}"
        name=$to$decoded
        with_more=$((with_more + more))
        case $kind in
            dir) ;;
            file) finish_file ;;
            bad) fault "${shown#*"$tab"}: not restored: ${shown%%"$tab"*}" ;;
            socket) sockets=$((sockets + 1)) ;;
            hard)
                decode "${target#@}"
                # Without its first name, which has been told, there is nothing to link to.
                if [ ! -e "$to$decoded" ] && [ ! -L "$to$decoded" ]; then
                    fault "$shown: not restored: it is a further name of one that is not there"
                elif ln -P -- "$to$decoded" "$name"; then
                    others=$((others + 1))
                else
                    fault "$shown: could not be linked"
                fi
                ;;
            *)
                if make_special; then
                    others=$((others + 1))
                    dress
                else
                    fault "$shown: could not be made"
                fi
                ;;
        esac
    done 3<"$tmp/entries"
    # Folders last, the deepest first: what is made in them changes their times.
    dirs=0
    tac "$tmp/entries" >"$tmp/backwards"
    while next_entry; do
        [ "$kind" = dir ] || continue
        decode "${rel#@}"
        name=$to$decoded
        if [ -e "$tmp/bad/$n" ]; then
            fault "$shown/: $(cat "$tmp/bad/$n")"
            continue
        fi
        dirs=$((dirs + 1))
        dress
    done 3<"$tmp/backwards"
    summary
}

summary() {
    say "run $run of $run_source: restored $files files, $others links and others, $dirs folders"
    [ "$is_root" = 1 ] || say "owners were not restored: only root can"
    [ "$with_more" = 0 ] || say "$with_more entries have attributes, access lists or flags," \
        "which are not restored; they are in the manifests (xattrs, flags)"
    [ "$sockets" = 0 ] || say "$sockets sockets were left out"
    [ "$unchecked" = 0 ] || say "the contents of $unchecked files were not checked against their" \
        "hashes: the hash is $run_algo, and its program (b3sum) is not here"
    [ "$faults" = 0 ] || say "$faults problems, each named above"
}

# --- Arguments --------------------------------------------------------------------------------

options=1 escaped=0 keep=0 recursive=0 words=0 volumes_given=''
one='' two='' three='' four=''
for argument in "$@"; do
    if [ "$volumes_given" = next ]; then
        volumes_given=''
        continue
    fi
    if [ "$options" = 1 ]; then
        case $argument in
            -v) volumes_given=next && continue ;;
            -e) escaped=1 && continue ;;
            -k) keep=1 && continue ;;
            -r) recursive=1 && continue ;;
            --) options=0 && continue ;;
            -h | --help)
                head -n 15 -- "$0" | tail -n 14
                exit 0
                ;;
            -?*) misused "unknown option '$argument' (a name that begins with - goes after --)" ;;
        esac
    fi
    words=$((words + 1))
    case $words in
        1) one=$argument ;;
        2) two=$argument ;;
        3) three=$argument ;;
        4) four=$argument ;;
        *) misused "too many arguments" ;;
    esac
done
[ -z "$volumes_given" ] || misused "-v needs a folder"
case $one:$words in
    list:1 | ls:2 | ls:3 | get:4) ;;
    *) misused "what is to be done? list, ls RUN [PATH], or get RUN PATH TO" ;;
esac
to=$four

start
case $0 in
    */*) own=${0%/*} ;;
    *) own=. ;;
esac
add_volume "${own:-/}" || true
is_volume=0
for argument in "$@"; do
    if [ "$is_volume" = 1 ]; then
        is_volume=0
        add_volume "$argument" || misused "'$argument' is no volume: it has no chunks or manifests"
    elif [ "$argument" = -v ]; then
        is_volume=1
    elif [ "$argument" = -- ]; then
        break
    fi
done
[ "$count" -gt 0 ] || misused "no volume: say where with -v DIR"

read_runs
case $one in
    list) list ;;
    ls)
        find_run "$two"
        find_path "$three"
        ls_path
        ;;
    get)
        find_run "$two"
        find_path "$three"
        get
        ;;
esac
[ "$faults" = 0 ]
