"""What scripts/bench --mount measures: our mounts, other programs' mounts of the same files, and
those files where they lie. Each thing that is mounted is made once and kept for later rounds."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import bench_data as data
import bench_measure as measure
import bench_tools as tools
from bench_measure import Failed, Step, quiet, say

MIB = 1 << 20

# The files that are measured, each in a directory of its own: `tree` is what was given, `text`
# one large file that compresses, `single` one that fits a block and does not compress, `many`
# another that needs many blocks.
SETS = ("tree", "text", "single", "many")
# Size of the file that is to fit a block.
SINGLE_MIB = 120
# Longest that a mount may take to answer, in seconds.
ANSWERS_WITHIN = 60


# --- The data ---------------------------------------------------------------------------------


class Sets:
    """Where each set of files is; what is missing is made below `place`."""

    def __init__(self, place, tree, files, large_mib):
        self.place = place
        self.tree = tree
        made = os.path.join(place, "made.json")
        wish = {"tree": tree or f"{files} files", "large": large_mib}
        if os.path.exists(made):
            with open(made, encoding="utf-8") as file:
                found = json.load(file)
            if found != wish:
                raise Failed(f"{place} was made for {found}, not for {wish}: give another --keep")
        with open(made, "w", encoding="utf-8") as file:
            json.dump(wish, file)
        if not tree:
            self._make("tree", lambda it: data.generate(it, files))
        self._make("text", lambda it: lines_of_text(os.path.join(it, "large.txt"), large_mib))
        single = min(SINGLE_MIB, large_mib)
        self._make("single", lambda it: noise(os.path.join(it, "raw.bin"), single, 3))
        self._make("many", lambda it: noise(os.path.join(it, "raw.bin"), large_mib, 4))

    def path(self, name):
        return self.tree if name == "tree" and self.tree else os.path.join(self.place, name)

    def _make(self, name, fill):
        path = os.path.join(self.place, name)
        if os.path.isdir(path):
            return
        say(f"making the files of '{name}'")
        temporary = path + ".making"
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        fill(temporary)
        os.rename(temporary, path)

    def file(self, name):
        """The path, in its set, of the one file of a set."""
        return os.listdir(self.path(name))[0]

    def size(self, name):
        return sum(it[1] for it in data.files_of(self.path(name)))


def lines_of_text(path, size_mib):
    """Text that compresses like program sources and holds nothing twice."""
    pick = random.Random(7)
    stock = data.text(pick, 8 * MIB).splitlines(keepends=True)
    with open(path, "wb") as file:
        while file.tell() < size_mib * MIB:
            file.write(b"".join(pick.choices(stock, k=20_000)))
        file.truncate(size_mib * MIB)


def noise(path, size_mib, seed):
    pick = random.Random(seed)
    with open(path, "wb") as file:
        for _ in range(size_mib):
            file.write(pick.randbytes(MIB))


def warm(*paths):
    """Reads files, and all files of directories, so that they are in the page cache. To be done
    right before measuring: some machines take unused pages away within a minute."""
    buffer = bytearray(MIB)
    for path in paths:
        files = data.files_of(path) if os.path.isdir(path) else [(path, 0)]
        for name, _ in files:
            with open(name, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# --- Mounts -----------------------------------------------------------------------------------


class Mount:
    """A mounted thing: its process, and the directories in it that hold the sets."""

    def __init__(self, tool, step, point, log, pin):
        self.tool = tool
        self.point = point
        self.log = log
        os.makedirs(point, exist_ok=True)
        step.command = [*pin, *step.command]
        self.start = time.monotonic()
        with open(log, "wb") as file:
            self.daemon = measure.start_child(step, file, stdout=file)

    def wait(self, name):
        """Waits until a set can be listed; gives the seconds since the start. Of ours the figures
        come after the second session is there, as for whoever waits until it says so."""
        root = self.root(name)
        seconds = None
        while True:
            try:
                if seconds is None and os.listdir(root):
                    seconds = time.monotonic() - self.start
                if seconds is not None and (not self.tool.is_ours or self.status()["mount"]["sessions"]):
                    return seconds
            except OSError:
                pass
            if self.daemon.poll() is not None:
                raise Failed(f"no mount: {measure.last_line(self.log)}")
            if time.monotonic() - self.start > ANSWERS_WITHIN:
                raise Failed(f"no mount in {ANSWERS_WITHIN} s: {measure.last_line(self.log)}")
            time.sleep(0.001)

    def root(self, name):
        return self.tool.root(self.point, name)

    def peak_bytes(self):
        """The most memory that the process has had."""
        with open(f"/proc/{self.daemon.pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        raise Failed(f"{self.tool.name} is gone: {measure.last_line(self.log)}")

    def cpu_seconds(self):
        return measure.cpu_seconds(self.daemon.pid)

    def status(self):
        """What our mount says of itself."""
        with open(os.path.join(self.point, ".ctl/status"), encoding="utf-8") as file:
            return json.load(file)

    def end(self):
        """Ends the mount in the ways there are, the polite ones first."""
        self.daemon.send_signal(signal.SIGTERM)
        for command in [None, ["fusermount3", "-u", self.point], ["umount", "-l", self.point]]:
            if command and os.path.ismount(self.point):
                subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
            try:
                self.daemon.wait(5)
            except subprocess.TimeoutExpired:
                continue
            if not os.path.ismount(self.point):
                return
        self.daemon.kill()
        self.daemon.wait()


# --- What can be mounted ----------------------------------------------------------------------


class Thing:
    """Something that shows some of the sets, by a mount or (`step` gives None) by itself."""

    name = ""
    is_ours = False
    sets = SETS

    def prepare(self, sets):
        """Makes what is mounted, if it is not there yet."""

    def step(self, point, name):
        """The command that mounts, and stays."""
        return None

    def root(self, point, name):
        raise NotImplementedError

    def backing(self, name):
        """What has to be in the page cache for the store to be warm."""
        raise NotImplementedError

    def version(self):
        return self.name


class Native(Thing):
    """The files where they lie."""

    name = "native"

    def prepare(self, sets):
        self.sets_there = sets

    def root(self, point, name):
        return self.sets_there.path(name)

    def backing(self, name):
        return [self.sets_there.path(name)]

    def version(self):
        place = self.sets_there.path("tree")
        return f"the files themselves, on {quiet(Step(['stat', '-f', '-c', '%T', place])).strip()}"


class Ours(Thing):
    """A store of ours; `words` are more arguments of its mount."""

    is_ours = True

    def __init__(self, name, program, place, words=()):
        self.name = name
        self.words = list(words)
        self.place = place
        self.tool = tools.RaidTape(program, place)

    def prepare(self, sets, names=SETS):
        done = os.path.join(self.place, "done")
        if os.path.exists(done):
            return
        shutil.rmtree(self.place, ignore_errors=True)
        os.makedirs(self.place)
        self.tool.init()
        for name in names:
            say(f"{self.name}: backing up '{name}'")
            quiet(self.tool.backup(sets.path(name), 0))
        with open(done, "w", encoding="ascii"):
            pass

    def step(self, point, name):
        step = self.tool.mount(1, point)
        step.command += self.words
        return step

    def root(self, point, name):
        return os.path.join(point, "snapshots", str(SETS.index(name) + 1))

    def backing(self, name):
        return [self.tool.repo]

    def version(self):
        words = " ".join(["", *self.words])
        return f"{self.tool.version()}, mount{words} ({self.tool.program})"

    def block_like(self, path):
        """The block file that holds exactly what a file holds, if there is one."""
        for block, size in data.files_of(os.path.join(self.tool.repo, "volume")):
            same = size == os.path.getsize(path)
            if same and subprocess.run(["cmp", "-s", block, path], check=False).returncode == 0:
                return block
        return None


class Squashfuse(Thing):
    """An image made by mksquashfs: zstd for all but `many`, which is not compressed."""

    program = "squashfuse"
    sets = ("tree", "text", "many")

    def __init__(self, place):
        self.name = self.program
        self.place = place

    def image(self, name):
        return os.path.join(self.place, f"{name}.squashfs")

    def prepare(self, sets):
        os.makedirs(self.place, exist_ok=True)
        for name in self.sets:
            if os.path.exists(self.image(name)):
                continue
            say(f"making the image of '{name}'")
            raw = ["-noI", "-noD", "-noF", "-noX", "-no-fragments", "-b", "1M"]
            how = raw if name == "many" else ["-comp", "zstd"]
            temporary = self.image(name) + ".making"
            command = ["mksquashfs", sets.path(name), temporary, *how]
            quiet(Step([*command, "-noappend", "-no-progress", "-quiet"]))
            os.rename(temporary, self.image(name))

    def step(self, point, name):
        return Step([self.program, "-f", self.image(name), point])

    def root(self, point, name):
        return point

    def backing(self, name):
        return [self.image(name)]

    def version(self):
        done = subprocess.run([self.program, "--help"], capture_output=True, text=True, check=False)
        lines = (done.stderr + done.stdout).splitlines()
        return next((it for it in lines if it.startswith("squashfuse ")), "of no known version")


class SquashfuseLow(Squashfuse):
    program = "squashfuse_ll"


class Restic(Thing):
    name = "restic"
    sets = ("tree",)

    def __init__(self, program, place):
        self.tool = tools.Restic(program, place)
        self.place = place

    def prepare(self, sets):
        done = os.path.join(self.place, "done")
        fresh = not os.path.exists(done)
        if fresh:
            shutil.rmtree(self.place, ignore_errors=True)
            os.makedirs(self.place)
        self.tool.env = {
            "RESTIC_REPOSITORY": self.tool.repo,
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": os.path.join(self.tool.state, "cache"),
        }
        if fresh:
            say("restic: backing up 'tree'")
            self.tool.init()
            quiet(self.tool.backup(sets.path("tree"), 1))
            with open(done, "w", encoding="ascii"):
                pass

    def step(self, point, name):
        return self.tool.mount(1, point)

    def root(self, point, name):
        return self.tool.mount_root(1, point)

    def backing(self, name):
        return [self.tool.repo, self.tool.state]

    def version(self):
        return self.tool.version()


class Casync(Thing):
    name = "casync"
    sets = ("tree",)

    def __init__(self, place):
        self.place = place

    def prepare(self, sets):
        index = os.path.join(self.place, "tree.caidx")
        if not os.path.exists(index):
            shutil.rmtree(self.place, ignore_errors=True)
            os.makedirs(self.place)
            say("casync: storing 'tree'")
            quiet(Step(["casync", "make", index, sets.path("tree")]))

    def step(self, point, name):
        return Step(["casync", "mount", os.path.join(self.place, "tree.caidx"), point])

    def root(self, point, name):
        return point

    def backing(self, name):
        return [self.place]

    def version(self):
        return quiet(Step(["casync", "--version"])).splitlines()[0]


def peers(place, wanted):
    """The peers that are there, and why others are not."""
    found, missing = [], {}

    def offer(name, needs, make):
        if wanted is not None and name not in wanted:
            return
        lacks = [it for it in needs if not shutil.which(it)]
        if lacks:
            missing[name] = f"{' and '.join(lacks)} not found on the path"
        else:
            found.append(make())

    images = os.path.join(place, "squashfs")
    offer("squashfuse", ["squashfuse", "mksquashfs"], lambda: Squashfuse(images))
    offer("squashfuse_ll", ["squashfuse_ll", "mksquashfs"], lambda: SquashfuseLow(images))
    restic = os.environ.get(tools.Restic.variable) or "restic"
    offer("restic", [restic], lambda: Restic(shutil.which(restic), os.path.join(place, "restic")))
    offer("casync", ["casync"], lambda: Casync(os.path.join(place, "casync")))
    return found, missing


PEERS = ("squashfuse", "squashfuse_ll", "restic", "casync")
