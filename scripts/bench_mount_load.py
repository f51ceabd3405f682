"""Lines of scripts/bench --mount that are more than one command: copying out, peak memory, many
readers beside a backup, and a million files."""

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import bench_data as data
import bench_measure as measure
import bench_mount_tools as things
from bench_measure import Failed, Step, quiet, say
from bench_mount_tools import MIB, warm

# Where copies go.
MEMORY_PLACE = "/dev/shm"
READERS = 100
# A process may take this and its cache.
MEMORY_MAX = 64 * MIB
# The slowest small reads may take this many times what they take otherwise.
SLOWER_MAX = 3.0
# Runs in the store of a million files, and how many of them are of those files.
MILLION_RUNS, MILLION_RUNS_OF_ALL = 200, 4
MILLION_LISTED_WITHIN = 0.1
BUFFER = 4096


class Restore:
    """Our own command, as what `cp -a` out of the mount is compared with."""

    name = "restore"
    is_ours = True


# --- Copying out ------------------------------------------------------------------------------


def place_for_copies(bench):
    """A directory in memory if there is room. On ext4 a copy soon after such a copy was deleted
    takes many times as long: it searches for inodes that were not in use lately."""
    size = sum(it[1] for it in data.files_of(bench.sets.path("tree")))
    try:
        if shutil.disk_usage(MEMORY_PLACE).free > 3 * size + (256 << 20):
            return tempfile.mkdtemp(prefix="raidtape-bench-", dir=MEMORY_PLACE)
    except OSError:
        pass
    say(f"no room in {MEMORY_PLACE}: copies go to the disk, where each is slowed by the last one")
    return bench.path("copies")


def copying(bench, line, number):
    place = place_for_copies(bench)
    try:
        copy_all(bench, line, number, os.path.join(place, "copy"))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def copy_all(bench, line, number, to):
    os.makedirs(os.path.dirname(to), exist_ok=True)

    def take(thing, state, step, mount=None):
        os.sync()
        if state == "dropped":
            bench.drop()
        bench.note(number, line, thing, state, bench.timed(step, mount))
        shutil.rmtree(to, ignore_errors=True)

    first = bench.crew[0]
    crew = [Restore(), *(it for it in bench.taking_part("tar", number))]
    for state in ["fresh", "dropped"] if bench.cold else ["fresh"]:
        for thing in crew:
            if isinstance(thing, Restore):
                warm(*first.backing("tree"))
                take(thing, state, first.tool.restore(bench.sets.path("tree"), 1, to))
                continue
            warm(*thing.backing("tree"))
            if isinstance(thing, things.Native):
                step = Step(["cp", "-a", thing.root(None, "tree"), to], accepted=(0, 1))
                take(thing, "again" if state == "fresh" else state, step)
                continue
            mount = bench.mounted(thing, "tree")
            try:
                mount.wait("tree")
                step = Step(["cp", "-a", mount.root("tree"), to], accepted=(0, 1))
                take(thing, state, step, mount)
            except (Failed, OSError) as error:
                bench.note(number, line, thing, state, {"failed": str(error)})
            finally:
                mount.end()


# --- Memory -----------------------------------------------------------------------------------


def memory(bench, line, number):
    """All kinds of reading on one mount, at last two at once; then what the process had at most."""
    for thing in bench.crew:
        if not thing.is_ours:
            continue
        mount = bench.mounted(thing, "tree")
        try:
            mount.wait("tree")
            tree, text = mount.root("tree"), mount.root("text")
            pipe = "set -o pipefail; tar cf - . | cat >/dev/null"
            walks = [["find", "."], ["ls", "-lR", "."], ["du", "-s", "."], ["bash", "-c", pipe]]
            for words in walks:
                bench.timed(Step(words, cwd=tree))
            for name in ("text", "single", "many"):
                bench.timed(Step(["cat", os.path.join(mount.root(name), bench.sets.file(name))]))
            if bench.cold:
                bench.drop()
            log = {"stdout": subprocess.DEVNULL}
            with open(bench.path("other"), "wb") as file:
                other = measure.start_child(Step(["bash", "-c", pipe], cwd=tree), file, **log)
                bench.timed(Step(["cat", os.path.join(text, bench.sets.file("text"))]))
                other.wait()
            figures = {"peak_bytes": mount.peak_bytes(), **kinds_of_memory(mount.daemon.pid)}
            figures["limit_bytes"] = MEMORY_MAX + mount.status()["cache"]["limit_bytes"]
            bench.note(number, line, thing, "after", figures)
        except (Failed, OSError) as error:
            bench.note(number, line, thing, "after", {"failed": str(error)})
        finally:
            mount.end()


def kinds_of_memory(pid):
    found = {}
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            for key, name in (("RssAnon:", "own_bytes"), ("RssFile:", "mapped_bytes")):
                if line.startswith(key):
                    found[name] = int(line.split()[1]) * 1024
    return found


# --- Readers beside a backup ------------------------------------------------------------------


def readers(bench, line, number):
    """Small reads are timed alone, beside a backup, beside readers, and beside both. The backups
    go into a store of its own, which is thrown away."""
    for thing in bench.crew:
        if not thing.is_ours:
            continue
        place = bench.path("readers")
        ours = things.Ours(thing.name, thing.tool.program, place, thing.words)
        mount = None
        try:
            ours.prepare(bench.sets, ["tree"])
            expected = hashes(bench.sets.path("tree"))
            mount = bench.mounted(ours, "tree")
            mount.wait("tree")
            figures = phases(bench, ours, mount, expected)
            bench.note(number, line, thing, "all", figures)
            if figures["wrong_bytes"] or figures["read_errors"]:
                bench.ours_failed = True
                say(f"{thing.name}: WRONG BYTES or errors: {figures}")
        except (Failed, OSError) as error:
            bench.note(number, line, thing, "all", {"failed": str(error)})
        finally:
            if mount:
                mount.end()
            shutil.rmtree(place, ignore_errors=True)


def hashes(tree):
    """Some files of a tree, of all sizes, with their hashes."""
    files = data.files_of(tree)
    random.Random(5).shuffle(files)
    found = []
    for path, size in files[:3000]:
        with open(path, "rb") as file:
            found.append((os.path.relpath(path, tree), size, hash_of(file)))
    if not any(size >= BUFFER for _, size, _ in found):
        raise Failed("the tree has no file of 4 KiB or more to read from")
    return found


def hash_of(file):
    return hashlib.file_digest(file, "blake2b").digest()


def phases(bench, ours, mount, expected):
    root, source = mount.root("tree"), bench.sets.path("tree")
    figures = {"files_checked": 0, "wrong_bytes": 0, "read_errors": 0, "backups": 0}

    def probe(name, seconds, backup):
        jobs = Backups(bench, ours, source) if backup else None
        try:
            figures.update(small_reads(name, root, expected, seconds, jobs))
        finally:
            if jobs:
                figures["backups"] += jobs.end()

    probe("alone", 3, False)
    probe("backup", 4, True)
    crowd = Crowd(bench, root, source, expected)
    try:
        time.sleep(0.5)
        probe("readers", 3, False)
        probe("readers_backup", 6, True)
    finally:
        for found in crowd.end():
            for key, value in found.items():
                figures[key] += value
    return figures


class Backups:
    """Backups into the mount's catalog, one after the other, as long as there is need."""

    def __init__(self, bench, ours, source):
        self.bench, self.ours, self.source = bench, ours, source
        self.extra = bench.path("extra")
        os.makedirs(self.extra, exist_ok=True)
        self.count = 0
        self.child = None
        self.log = open(bench.path("backups"), "wb")  # noqa: SIM115, closed by `end`
        self.next()

    def next(self):
        """Sees to it that one is running: of the whole tree, or of something new."""
        if self.child:
            if self.child.poll() is None:
                return
            self._check()
        with open(os.path.join(self.extra, "new"), "wb") as file:
            for _ in range(24):
                file.write(os.urandom(MIB))
        what = [self.source, self.extra][self.count % 2]
        step = self.ours.tool.make(["backup", "--force-read", what])
        self.child = measure.start_child(step, self.log)

    def _check(self):
        if self.child.wait() not in (0, 3):
            said = measure.last_line(self.bench.path("backups"))
            raise Failed(f"a backup beside the readers: {said}")
        self.count += 1

    def end(self):
        try:
            self._check()
        finally:
            self.log.close()
        return self.count


def small_reads(name, root, expected, seconds, jobs):
    """Times reads of 4 KiB that the kernel has not in its cache, at random places."""
    pick = random.Random(name)
    files = [(os.path.join(root, path), size) for path, size, _ in expected if size >= BUFFER]
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if jobs and len(times) % 16 == 0:
            jobs.next()
        path, size = pick.choice(files)
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            at = pick.randrange(size // BUFFER) * BUFFER
            start = time.perf_counter()
            os.pread(file, BUFFER, at)
            times.append(time.perf_counter() - start)
        finally:
            os.close(file)
        time.sleep(0.002)
    times.sort()
    return {
        f"{name}_p50_us": round(times[len(times) // 2] * 1e6),
        f"{name}_p99_us": round(times[len(times) * 99 // 100] * 1e6),
        f"{name}_reads": len(times),
    }


class Crowd:
    """Readers, a process each, that check random files again and again."""

    def __init__(self, bench, root, source, expected):
        self.bench = bench
        self.pids = []
        sys.stdout.flush()
        ended = []
        # Before there is any, so that none is asked to end while it cannot hear it.
        before = signal.signal(signal.SIGUSR1, lambda *_: ended.append(True))
        for number in range(READERS):
            pid = os.fork()
            if pid == 0:
                # Never back into the caller's code, whatever happens.
                try:
                    read_and_check(self._path(number), number, root, source, expected, ended)
                finally:
                    os._exit(0)
            self.pids.append(pid)
        signal.signal(signal.SIGUSR1, before)

    def _path(self, number):
        return self.bench.path(f"reader{number}")

    def end(self):
        """Ends them; gives what each has found."""
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1)
        for pid in self.pids:
            os.waitpid(pid, 0)
        found = []
        for number in range(READERS):
            try:
                with open(self._path(number), encoding="ascii") as file:
                    found.append(json.load(file))
            except (OSError, ValueError) as error:
                raise Failed(f"reader {number} has died: {error}") from error
        return found


def read_and_check(report_path, number, root, source, expected, ended):
    pick = random.Random(number)
    found = {"files_checked": 0, "wrong_bytes": 0, "read_errors": 0}
    while not ended:
        path, _, right = pick.choice(expected)
        try:
            with open(os.path.join(root, path), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if hash_of(file) != right:
                    file.seek(0)
                    found["wrong_bytes"] += difference(os.path.join(source, path), file.read())
            found["files_checked"] += 1
        except OSError:
            found["read_errors"] += 1
        # So many at full speed would measure how the processors are shared, and nothing else.
        time.sleep(pick.random() / 5)
    with open(report_path, "w", encoding="ascii") as file:
        json.dump(found, file)


def difference(path, content):
    with open(path, "rb") as file:
        right = file.read()
    wrong = sum(a != b for a, b in zip(right, content))
    # What was wrong once and is right now is wrong all the same.
    return max(1, wrong + abs(len(right) - len(content)))


# --- A million files --------------------------------------------------------------------------


def million(bench, program, keep, count):
    """Stores many files and 200 runs; times the mount until the run of them all is listed."""
    place = os.path.join(keep, f"million-{count}-{bench.args.store}")
    ours = things.Ours("raidtape", program, place)
    make_million(ours, place, count)
    for number in range(1, bench.args.rounds + 1):
        for thing in bench.crew:
            if not thing.is_ours or thing.tool.program != program:
                continue
            big = things.Ours(thing.name, program, place, thing.words)
            for state in ["fresh", "dropped"] if bench.cold else ["fresh"]:
                if state == "fresh":
                    warm(os.path.dirname(big.tool.catalog()))
                else:
                    bench.drop()
                mount = bench.mounted(big, "tree")
                try:
                    figures = {"seconds": round(mount.wait("tree"), 5)}
                    start = time.monotonic()
                    runs = len(os.listdir(os.path.join(mount.point, "snapshots"))) - 1
                    figures["list_runs_seconds"] = round(time.monotonic() - start, 5)
                    figures["runs"] = runs
                    if state == "fresh":
                        found = bench.timed(Step(["find", "."], cwd=mount.root("tree")), mount)
                        figures["find_seconds"] = found["seconds"]
                    figures["peak_bytes"] = mount.peak_bytes()
                    bench.note(number, "million", big, state, figures)
                except (Failed, OSError) as error:
                    bench.note(number, "million", big, state, {"failed": str(error)})
                finally:
                    mount.end()


def make_million(ours, place, count):
    done = os.path.join(place, "done")
    if os.path.exists(done):
        return
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    ours.tool.init()
    source, small = os.path.join(place, "source"), os.path.join(place, "small")
    say(f"making {count} files")
    data.million(source, count)
    data.generate_small(small)
    say(f"{MILLION_RUNS} backups")
    for number in range(MILLION_RUNS):
        of_all = number % (MILLION_RUNS // MILLION_RUNS_OF_ALL) == 0
        name = "group 0/0/0.dat" if of_all else "0"
        with open(os.path.join(source if of_all else small, name), "ab") as file:
            file.write(b"changed %d\n" % number)
        quiet(ours.tool.backup(source if of_all else small, number))
    shutil.rmtree(source)
    with open(done, "w", encoding="ascii"):
        pass


# --- Results ----------------------------------------------------------------------------------


def rows_of(bench, line, name=None):
    rows = [it for it in bench.rows if it["line"] == line and "failed" not in it]
    return [it for it in rows if name is None or it["tool"] == name]


def goals(bench):
    """The goals that are no ratio of two times."""
    found = []

    def add(line, state, tool, value, most, unit):
        goal = {"line": line, "state": state, "tool": tool, "at_most": round(most, 3)}
        found.append({**goal, "is": round(value, 3), "unit": unit, "met": value <= most})

    for name in [it.name for it in bench.crew if it.is_ours]:
        rows = rows_of(bench, "memory", name)
        if rows:
            peak = max(it["peak_bytes"] for it in rows) / MIB
            add("memory", "after", name, peak, rows[0]["limit_bytes"] / MIB, "MiB")
        rows = rows_of(bench, "random4", name)
        if rows:
            frames = statistics.median(it["frames_per_read"] for it in rows)
            add("random4", "fresh", name, frames, 1, "frames a read")
        rows = rows_of(bench, "readers", name)
        if rows:
            wrong = sum(it["wrong_bytes"] + it["read_errors"] for it in rows)
            add("readers", "all", name, wrong, 0, "wrong bytes or errors")
            for busy, idle in (("backup", "alone"), ("readers_backup", "readers")):
                slower = [it[f"{busy}_p99_us"] / max(1, it[f"{idle}_p99_us"]) for it in rows]
                words = f"of the p99 of {idle}"
                add("readers", busy, name, statistics.median(slower), SLOWER_MAX, words)
        for state in ("fresh", "dropped"):
            rows = [it for it in rows_of(bench, "million", name) if it["state"] == state]
            if rows and state == "fresh":
                value = statistics.median(it["seconds"] for it in rows)
                add("million", state, name, value, MILLION_LISTED_WITHIN, "s")
    return found


def report(bench):
    for name in dict.fromkeys(it["tool"] for it in rows_of(bench, "memory")):
        row = max(rows_of(bench, "memory", name), key=lambda it: it["peak_bytes"])
        parts = {key: f"{row.get(key, 0) / MIB:.1f}" for key in ("own_bytes", "mapped_bytes")}
        print(
            f"\nmemory: {name}: peak {row['peak_bytes'] / MIB:.1f} MiB, of "
            f"{row['limit_bytes'] / MIB:.0f}; at the end {parts['own_bytes']} MiB own, "
            f"{parts['mapped_bytes']} MiB of mapped files"
        )
    for row in rows_of(bench, "readers"):
        print(
            f"\nreaders: {row['tool']}: {row['files_checked']} files checked by {READERS} readers "
            f"beside {row['backups']} backups: {row['wrong_bytes']} wrong bytes, "
            f"{row['read_errors']} errors; a read of 4 KiB took"
        )
        for phase in ("alone", "backup", "readers", "readers_backup"):
            p50, p99 = row[f"{phase}_p50_us"], row[f"{phase}_p99_us"]
            print(f"  {phase:<15} p50 {p50:>6} us, p99 {p99:>6} us ({row[f'{phase}_reads']} reads)")
    rows = rows_of(bench, "million")
    for name, state in dict.fromkeys((it["tool"], it["state"]) for it in rows):
        same = [it for it in rows if (it["tool"], it["state"]) == (name, state)]

        def middle(key, same=same):
            values = [it[key] for it in same if key in it]
            return statistics.median(values) if values else None

        found = middle("find_seconds")
        print(
            f"\nmillion: {name}, {state}: listed after {middle('seconds'):.4f} s, all "
            f"{same[0]['runs']} runs in {middle('list_runs_seconds'):.4f} s"
            f"{f', find {found:.2f} s' if found else ''}, peak {middle('peak_bytes') / MIB:.0f} MiB"
        )
