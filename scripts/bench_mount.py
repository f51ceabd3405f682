"""Times our mount beside other mounts and the file system itself, in the same run.

    scripts/bench --mount [DIR | --files N] [--only LINE,LINE] [--rounds N] [--pin] [--million [N]]
                  [--keep DIR | --tmp DIR] [--peers A,B | --peers none] [--json FILE] [--large MIB]
                  [--bin PROGRAM] [--also 'NAME=PROGRAM'] [--mount-args 'NAME=ARGUMENTS']

Lines: LINES

DIR is only read. Without DIR a tree of --files small files is made. Besides it there are a large
file that compresses and two that do not, of --large MiB. For every figure there is a new mount:
    fresh    the store is in the page cache, but nothing of the mount is
    again    the same once more on that mount; for the file system itself: all is cached
    dropped  after all caches were dropped (root only)
Things take turns within a round, and who goes first rotates. Ratios are taken within a round; what
is told are the medians of all rounds.

--mount-args measures one more mount of the same store, with these arguments; --also another
program with a store of its own. Both may be given several times. --pin repeats the lines of
metadata with the mount's process and its client on one processor. --keep uses a directory for data,
stores and images that stays: the next call with the same one begins at once. --million N stores N
tiny files and 200 runs, and times the first listing.

squashfuse, squashfuse_ll, restic (RESTIC_BIN) and casync take part if they are found; those that
are missing are named. Random reads need fio. RAIDTAPE_BIN or --bin names the program to measure;
otherwise a release build is made now.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time

import bench_data as data
import bench_measure as measure
import bench_mount_load as load
import bench_mount_tools as things
from bench_measure import Failed, Step, say
from bench_mount_tools import MIB, warm

LINES = {
    "ls": "mount, until a snapshot can be listed",
    "find": "find",
    "lslr": "ls -lR",
    "du": "du",
    "tar": "tar through a pipe",
    "cat": "cat of a large file that compresses",
    "single": "cat of a file that is one raw block; native: of the block file",
    "many": "cat of a file of many raw blocks; squashfuse: image not compressed",
    "random64": "random reads of 64 KiB of a large file that compresses",
    "random4": "random reads of 4 KiB of a large file that compresses",
    "cp": "cp -a of the tree out of the mount; 'restore' is the command",
    "memory": "peak memory of the mount's process after all kinds of reading",
    "readers": "a small read's time beside 100 readers and a backup",
}
METADATA = {"find": ["find", "."], "lslr": ["ls", "-lR", "."], "du": ["du", "-s", "."]}
FILES = {"cat": "text", "single": "single", "many": "many"}
# Lines that are repeated on one processor by --pin.
PINNED = {"ls", "tar", *METADATA}
# Lines in which the slow peers take part as well.
SLOW_PEERS_IN = {"ls", "find"}

BEST = "best squashfuse"
# What is to be reached: line, state of ours, reference, its state, ours at most so many times it.
# Without a reference, seconds.
GOALS = [
    ("ls", "fresh", None, None, 0.1),
    ("find", "fresh", BEST, "fresh", 2.0),
    ("find", "again", "native", "again", 1.15),
    *((line, "fresh", BEST, "fresh", 1.0) for line in ("lslr", "du", "tar")),
    *((line, "fresh", "native", "dropped", 1.0) for line in ("lslr", "du", "tar")),
    *((line, "dropped", BEST, "dropped", 1.0) for line in ("lslr", "du", "tar")),
    *((line, "dropped", "native", "dropped", 1.0) for line in ("lslr", "du", "tar")),
    ("tar", "again", "native", "again", 1.5),
    ("cat", "fresh", BEST, "fresh", 1.0),
    ("cat", "dropped", BEST, "dropped", 1.0),
    ("single", "fresh", "native", "again", 1 / 0.9),
    ("single", "dropped", "native", "dropped", 1 / 0.9),
    ("many", "fresh", BEST, "fresh", 1 / 0.9),
    ("many", "dropped", BEST, "dropped", 1 / 0.9),
    ("random64", "fresh", BEST, "fresh", 1.0),
    ("random4", "fresh", BEST, "fresh", 1.0),
    ("cp", "fresh", "restore", "fresh", 1.3),
    ("cp", "dropped", "restore", "dropped", 1.3),
]


class Bench:
    """One run of this script: what takes part, and what has been measured."""

    def __init__(self, args, place, cold):
        self.args = args
        self.place = place
        self.cold = cold
        self.rows = []
        self.ours_failed = False
        self.sets = None
        # Bytes of each set, told when the sets themselves are gone.
        self.sizes = {}
        self.crew = []
        self.mounts = 0
        self.cpu = str(min(os.sched_getaffinity(0)))

    def path(self, name):
        return os.path.join(self.place, name)

    def pin(self, pinned):
        return ["taskset", "-c", self.cpu] if pinned else []

    def note(self, number, line, thing, state, figures):
        row = {"round": number, "line": line, "tool": thing.name, "state": state, **figures}
        self.rows.append(row)
        where = f"round {number}: {line}, {state}: {thing.name}"
        if "failed" in figures:
            self.ours_failed |= thing.is_ours
            say(f"{where} FAILED: {figures['failed']}")
        elif "seconds" in figures:
            say(f"{where} {figures['seconds']:.4f} s")

    def taking_part(self, line, number):
        """Who does a line, in the order of the round."""
        found = []
        for thing in self.crew:
            slow = isinstance(thing, (things.Restic, things.Casync))
            if line == "ls" and isinstance(thing, things.Native):
                continue
            if FILES.get(line, "tree") in thing.sets and (not slow or line in SLOW_PEERS_IN):
                found.append(thing)
        shift = (number - 1) % max(1, len(found))
        return found[shift:] + found[:shift]

    def mounted(self, thing, name, pinned=False):
        """A new mount that shows a set."""
        self.mounts += 1
        point = self.path(f"mnt{self.mounts}")
        step = thing.step(point, name)
        return things.Mount(thing, step, point, self.path("log"), self.pin(pinned))

    def timed(self, step, mount=None):
        """Runs a command of which nothing is kept; its figures have the mount's use in them."""
        before = mount.cpu_seconds() if mount else 0
        with open(self.path("client"), "wb") as log:
            start = time.monotonic()
            child = measure.start_child(step, log, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(child.pid, 0)
            seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        figures = {"seconds": round(seconds, 5), "cpu_seconds": used.ru_utime + used.ru_stime}
        if mount:
            figures["cpu_seconds"] += mount.cpu_seconds() - before
            figures["peak_bytes"] = mount.peak_bytes()
        figures["cpu_seconds"] = round(figures["cpu_seconds"], 3)
        if child.returncode not in step.accepted:
            words = measure.last_line(self.path("client"))
            figures["failed"] = f"code {child.returncode}: {words}"
        return figures

    def drop(self):
        if not measure.drop_caches():
            raise Failed("the page cache could be dropped before, and now it cannot")


# --- Lines that are a command -----------------------------------------------------------------


def command_of(bench, line, root, pinned):
    """The command of a line, to be run on the set at `root`."""
    pin = bench.pin(pinned)
    if line in METADATA:
        return Step([*pin, *METADATA[line]], cwd=root)
    if line == "tar":
        # Through a pipe: tar does not read files if it writes to /dev/null.
        script = "set -o pipefail; tar cf - . | cat >/dev/null"
        return Step([*pin, "bash", "-c", script], cwd=root, accepted=(0, 1, 2))
    return Step(["cat", os.path.join(root, bench.sets.file(FILES[line]))])


def measure_line(bench, line, number):
    for thing in bench.taking_part(line, number):
        for pinned in [False, True] if bench.args.pin and line in PINNED else [False]:
            passes = native_passes if isinstance(thing, things.Native) else mount_passes
            try:
                passes(bench, line, number, thing, pinned)
            except (Failed, OSError) as error:
                bench.note(number, line, thing, "fresh", {"failed": str(error)})


def native_passes(bench, line, number, thing, pinned):
    """The file system itself: warm, then cold."""
    name = FILES.get(line, "tree")
    step = command_of(bench, line, thing.root(None, name), pinned)
    if line == "single":
        block = bench.crew[0].block_like(step.command[-1])
        if block is None:
            say("no block holds exactly the file of 'single': its reference is the file itself")
        else:
            step = Step(["cat", block])
    more = " pinned" if pinned else ""
    bench.timed(step)
    bench.note(number, line, thing, "again" + more, bench.timed(step))
    if bench.cold:
        bench.drop()
        bench.note(number, line, thing, "dropped" + more, bench.timed(step))


def mount_passes(bench, line, number, thing, pinned):
    name = FILES.get(line, "tree")
    more = " pinned" if pinned else ""
    for state in ["fresh", "dropped"] if bench.cold else ["fresh"]:
        if state == "fresh":
            warm(*thing.backing(name))
        elif line == "ls":
            bench.drop()
        mount = bench.mounted(thing, name, pinned)
        try:
            seconds = mount.wait(name)
            if line == "ls":
                figures = {"seconds": round(seconds, 5), "cpu_seconds": mount.cpu_seconds()}
                figures["peak_bytes"] = mount.peak_bytes()
                bench.note(number, line, thing, state + more, figures)
                continue
            step = command_of(bench, line, mount.root(name), pinned)
            if state == "dropped":
                bench.drop()
            bench.note(number, line, thing, state + more, bench.timed(step, mount))
            if state == "fresh":
                bench.note(number, line, thing, "again" + more, bench.timed(step, mount))
        finally:
            mount.end()


# --- Random reads -----------------------------------------------------------------------------


def measure_random(bench, line, number):
    """fio on a fresh mount; a row's seconds are those of one read."""
    size, reads = ("64k", 2000) if line == "random64" else ("4k", 5000)
    for thing in bench.taking_part("cat", number):
        native = isinstance(thing, things.Native)
        warm(*thing.backing("text"))
        mount = None if native else bench.mounted(thing, "text")
        try:
            if mount:
                mount.wait("text")
            root = thing.root(None, "text") if native else mount.root("text")
            before = mount.status()["cache"] if thing.is_ours else None
            figures = random_reads(bench, os.path.join(root, bench.sets.file("text")), size, reads)
            if thing.is_ours and "failed" not in figures:
                after = mount.status()["cache"]
                misses = after.get("misses", 0) - before.get("misses", 0)
                figures["frames_per_read"] = round(misses / reads, 3)
            bench.note(number, line, thing, "again" if native else "fresh", figures)
        except (Failed, OSError) as error:
            bench.note(number, line, thing, "fresh", {"failed": str(error)})
        finally:
            if mount:
                mount.end()


def random_reads(bench, path, size, reads):
    # fio's own dropping of caches is no use here, and for the files themselves a mistake.
    words = [f"--filename={path}", f"--bs={size}", f"--number_ios={reads}", "--invalidate=0"]
    more = ["--rw=randread", "--ioengine=psync", "--readonly", "--output-format=json"]
    step = Step(["fio", "--name=random", *words, *more, f"--output={bench.path('fio')}"])
    figures = bench.timed(step)
    if "failed" in figures:
        return figures
    with open(bench.path("fio"), encoding="utf-8") as file:
        text = file.read()
    found = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    times = found["clat_ns"]["percentile"]
    return {
        "seconds": 1 / max(found["iops"], 1e-3),
        "reads_per_second": round(found["iops"]),
        "p50_us": times["50.000000"] / 1000,
        "p99_us": times["99.000000"] / 1000,
    }


# --- Results ----------------------------------------------------------------------------------


def good(bench, line, state, name):
    """Rounds and seconds of a thing at a line; `BEST` takes the better of two in each round."""
    if name == BEST:
        found = {}
        for peer in ("squashfuse", "squashfuse_ll"):
            for number, seconds in good(bench, line, state, peer).items():
                found[number] = min(seconds, found.get(number, seconds))
        return found
    return {
        row["round"]: row["seconds"]
        for row in bench.rows
        if (row["line"], row["state"], row["tool"]) == (line, state, name)
        and "failed" not in row
        and "seconds" in row
    }


def ratio(ours, theirs):
    """Our figure by theirs in the same round, the median of all rounds."""
    both = [ours[it] / max(theirs[it], 1e-9) for it in ours if it in theirs]
    return statistics.median(both) if both else None


def goals(bench):
    """What was to be reached, and whether it was: nothing is said of what was not measured."""
    found = []
    for line, state, reference, their_state, most in GOALS:
        for more in ("", " pinned"):
            for name in [it.name for it in bench.crew if it.is_ours]:
                ours = good(bench, line, state + more, name)
                if not ours:
                    continue
                goal = {"line": line, "state": state + more, "tool": name}
                goal["at_most"] = round(most, 3)
                if reference is None:
                    value = statistics.median(ours.values())
                else:
                    goal["reference"] = f"{reference}, {their_state}{more}"
                    value = ratio(ours, good(bench, line, their_state + more, reference))
                if value is None:
                    found.append({**goal, "is": None, "met": None})
                else:
                    found.append({**goal, "is": round(value, 3), "met": value <= most})
    return found + load.goals(bench)


def report(bench, result):
    first = bench.crew[0].name
    print(f"\nmedians of {result['rounds']} rounds; 'ours' is {first}'s time divided by this one")
    if not bench.cold:
        print("NOTHING WAS DROPPED: there are no cold figures")
    for line in bench.args.only:
        rows = [row for row in bench.rows if row["line"] == line and "seconds" in row]
        if not rows:
            continue
        print(f"\n{line}: {LINES[line]}")
        states = dict.fromkeys(row["state"] for row in rows)
        for state in sorted(states, key=lambda it: (it.split()[1:], it != "fresh", it)):
            for name in dict.fromkeys(row["tool"] for row in rows):
                theirs = good(bench, line, state, name)
                if not theirs:
                    continue
                seconds = statistics.median(theirs.values())
                ours = ratio(good(bench, line, state, first), theirs)
                ours = "" if ours is None or name == first else f"{ours:.2f}"
                same = [it for it in rows if (it["state"], it["tool"]) == (state, name)]
                more = extra(bench, line, same)
                print(f"  {state:<15} {name:<18} {seconds:>10.5f} s {ours:>7}  {more}")
    load.report(bench)
    print("\ngoals:")
    for goal in result["goals"]:
        against = f"of {goal['reference']}" if "reference" in goal else goal.get("unit", "s")
        met = {True: "met   ", False: "MISSED", None: "UNKNOWN, nothing to compare with:"}
        print(
            f"  {met[goal['met']]} {goal['line']}, {goal['state']}: "
            f"{goal['tool']} {goal['is']} {against}, at most {goal['at_most']}"
        )
    print("\ntook part:")
    for name, version in result["versions"].items():
        print(f"  {name}: {version}")
    for name, why in result["missing"].items():
        print(f"  {name}: MISSING, {why}")
    for row in bench.rows:
        if "failed" in row:
            print(f"  {row['tool']} FAILED at '{row['line']}', {row['state']}: {row['failed']}")


def extra(bench, line, rows):
    """What else is worth a word about rows of one kind."""
    found = []

    def add(key, form):
        values = [row[key] for row in rows if key in row]
        if values:
            found.append(form(statistics.median(values)))

    if line in FILES:
        size = bench.sizes[FILES[line]]
        add("seconds", lambda it: f"{size / MIB / it:.0f} MiB/s")
    add("reads_per_second", lambda it: f"{it:.0f} reads/s")
    add("p50_us", lambda it: f"p50 {it:.0f} us")
    add("p99_us", lambda it: f"p99 {it:.0f} us")
    add("frames_per_read", lambda it: f"{it:.2f} frames decompressed a read")
    add("cpu_seconds", lambda it: f"CPU {it:.2f} s")
    add("peak_bytes", lambda it: f"peak {it / MIB:.0f} MiB")
    return ", ".join(found)


# --- The run ----------------------------------------------------------------------------------


def arguments(words):
    described = __doc__.replace("LINES", ", ".join(LINES), 1)
    parser = argparse.ArgumentParser(
        prog="bench --mount",
        description=described,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", nargs="?", help="tree to measure with (default: one is made)")
    parser.add_argument("--files", type=int, default=4000, metavar="N", help="small files to make")
    parser.add_argument("--large", type=int, default=512, metavar="MIB", help="default: 512")
    parser.add_argument("--only", metavar="A,B", help="only these lines (default: all)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--pin", action="store_true", help="also on one processor")
    parser.add_argument("--warm", action="store_true", help="never drop caches")
    parser.add_argument("--peers", metavar="A,B", help="only these, or none (default: all)")
    parser.add_argument("--keep", metavar="DIR", help="where data and stores are, and stay")
    parser.add_argument("--tmp", metavar="DIR", help="where to work (default: TMPDIR or /tmp)")
    parser.add_argument("--million", type=int, nargs="?", const=1_000_000, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write all figures here")
    parser.add_argument("--bin", metavar="PROGRAM", help="the raidtape to measure")
    parser.add_argument("--store", default="raidtape", metavar="NAME", help="our store in --keep")
    pairs = {"action": "append", "default": []}
    parser.add_argument("--also", metavar="NAME=PROGRAM", help="another raidtape", **pairs)
    parser.add_argument("--mount-args", metavar="NAME=ARGS", help="another mount of ours", **pairs)
    args = parser.parse_args(words)
    for name in ("files", "large", "rounds", "million"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.only = args.only.split(",") if args.only else list(LINES)
    if not set(LINES).issuperset(args.only):
        parser.error(f"--only takes some of {', '.join(LINES)}")
    args.peers = args.peers.split(",") if args.peers is not None else None
    if not {"none", *things.PEERS}.issuperset(args.peers or []):
        parser.error(f"--peers takes some of {', '.join(things.PEERS)}, or none")
    taken = {"raidtape", "native", "restore", *things.PEERS}
    for option in ("also", "mount_args"):
        given = []
        for word in getattr(args, option):
            name, found, value = word.partition("=")
            if not found or not name or name in taken:
                parser.error(f"--{option.replace('_', '-')} takes NAME=…, each name once: {word}")
            taken.add(name)
            given.append((name, value))
        setattr(args, option, given)
    return args


def gather(bench, program, keep):
    """Makes what is measured, and says what is missing."""
    args = bench.args
    tree = os.path.realpath(args.dir) if args.dir else None
    if tree and not os.path.isdir(tree):
        raise Failed(f"{tree} is not a directory")
    for place in (keep, bench.place):
        if tree and os.path.commonpath([place, tree]) == tree:
            raise Failed(f"{place} lies inside {tree}: give another --keep or --tmp")
    os.makedirs(keep, exist_ok=True)
    bench.sets = things.Sets(keep, tree, args.files, args.large)
    bench.sizes = {it: bench.sets.size(it) for it in things.SETS}
    store = os.path.join(keep, f"store-{args.store}")
    bench.crew = [things.Ours("raidtape", program, store)]
    for name, words in args.mount_args:
        bench.crew.append(things.Ours(name, program, store, shlex.split(words)))
    for name, other in args.also:
        found = shutil.which(other)
        if not found:
            raise Failed(f"{other} cannot be run")
        place = os.path.join(keep, f"store-{name}")
        bench.crew.append(things.Ours(name, os.path.realpath(found), place))
    found, missing = things.peers(keep, args.peers)
    bench.crew += [*found, things.Native()]
    if not shutil.which("fio") and {"random4", "random64"}.intersection(args.only):
        missing["fio"] = "not found on the path: there are no random reads"
        args.only = [it for it in args.only if not it.startswith("random")]
    if args.pin and not shutil.which("taskset"):
        missing["taskset"] = "not found on the path: nothing is pinned"
        args.pin = False
    for name, why in missing.items():
        say(f"{name} is MISSING: {why}")
    for thing in bench.crew:
        thing.prepare(bench.sets)
    return missing


def run(args, program):
    base = os.path.realpath(args.tmp or tempfile.gettempdir())
    place = tempfile.mkdtemp(prefix="raidtape-bench-", dir=base)
    cold = not args.warm and os.geteuid() == 0 and measure.drop_caches()
    if not cold and not args.warm:
        say("the page cache cannot be dropped (only root can): there will be no cold figures")
    bench = Bench(args, place, cold)
    keep = os.path.realpath(args.keep) if args.keep else bench.path("made")
    result = {"tree": args.dir or "generated", "rounds": args.rounds, "cold": cold}
    try:
        result["missing"] = gather(bench, program, keep)
        result["versions"] = {it.name: it.version() for it in bench.crew}
        if args.million:
            load.million(bench, program, keep, args.million)
        kinds = {"cp": load.copying, "memory": load.memory, "readers": load.readers}
        kinds |= {"random4": measure_random, "random64": measure_random}
        for number in range(1, args.rounds + 1):
            for line in args.only:
                kinds.get(line, measure_line)(bench, line, number)
    finally:
        clean_up(place)
    result["bytes"] = bench.sizes
    result["goals"] = goals(bench)
    result["machine"] = {
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
    }
    result["all"] = bench.rows
    report(bench, result)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    if bench.ours_failed:
        raise Failed("raidtape FAILED at something, see above")


def clean_up(place):
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        left = [line.split()[1] for line in file if line.split()[1].startswith(place + "/")]
    if left:
        say(f"something is still mounted on {', '.join(left)}: not removing {place}")
    else:
        shutil.rmtree(place)
