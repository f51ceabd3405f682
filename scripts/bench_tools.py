"""What is compared: RaidTape, `cp -a`, `tar` and `find` of the same tree, and other backup
programs. Each says by which command it does a step, or None if it has no such thing. Used by
scripts/bench."""

import os
import shutil

from bench_measure import Step, quiet

# A tool's commands get: `source`, the tree; `run`, 1 for the first backup, 2 for the next and so
# on; `to`, a directory for what comes back; `file`, a path in the tree.


class Tool:
    """One program, with a repository of its own in a directory of its own."""

    name = ""
    # Where the program is looked for: a variable of the environment, then the path.
    variable = ""
    is_peer = True
    accepted = (0,)

    def __init__(self, program, place):
        self.program = program
        self.repo = os.path.join(place, "repo")
        self.state = os.path.join(place, "state")
        self.env = {}

    def make(self, words, cwd=None):
        return Step([self.program, *words], cwd=cwd, env=self.env, accepted=self.accepted)

    def version(self):
        return quiet(Step([self.program, "--version"])).splitlines()[0]

    def init(self):
        """Makes the repository; not measured."""
        os.makedirs(self.state, exist_ok=True)

    def backup(self, source, run):
        return None

    def unchanged(self, source, run):
        return self.backup(source, run)

    def restore(self, source, run, to):
        return None

    def one_file(self, source, run, file, to):
        return None

    def verify(self, source):
        return None

    def mount(self, run, point):
        return None

    def mount_root(self, run, point):
        return point


class RaidTape(Tool):
    name = "raidtape"
    variable = "RAIDTAPE_BIN"
    is_peer = False
    # 3: done, but some entries could not be read, and are named.
    accepted = (0, 3)

    def catalog(self):
        return os.path.join(self.repo, "catalog")

    def make(self, words, cwd=None):
        return super().make(["--catalog", self.catalog(), *words], cwd)

    def init(self):
        super().init()
        os.makedirs(self.repo)
        quiet(self.make(["init", "--reserve", "1"]))
        quiet(self.make(["add-volume", os.path.join(self.repo, "volume")]))

    def backup(self, source, run):
        return self.make(["backup", source])

    def restore(self, source, run, to):
        return self.make(["revert-to-run", str(run), to])

    def one_file(self, source, run, file, to):
        return self.make(["restore", file, os.path.join(to, "file"), "--run", str(run)])

    def verify(self, source):
        return self.make(["validate"])

    def mount(self, run, point):
        return self.make(["mount", "--foreground", point])

    def mount_root(self, run, point):
        return os.path.join(point, "snapshots", str(run))


# --- What the system has itself ---------------------------------------------------------------


class Cp(Tool):
    """A copy, which keeps no run but the last."""

    name = "cp"
    is_peer = False
    accepted = (0, 1)

    def version(self):
        return "cp -a"

    def init(self):
        super().init()
        os.makedirs(self.repo)

    def backup(self, source, run):
        # Each run is a copy of its own.
        return self.make(["-a", source, os.path.join(self.repo, str(run))])

    def unchanged(self, source, run):
        return None

    def restore(self, source, run, to):
        return self.make(["-a", os.path.join(self.repo, str(run)), to])

    def one_file(self, source, run, file, to):
        return self.make(["-a", os.path.join(self.repo, str(run), file), to])


class Tar(Tool):
    name = "tar"
    is_peer = False
    accepted = (0, 1, 2)

    def version(self):
        return "tar, not compressed"

    def init(self):
        super().init()
        os.makedirs(self.repo)

    def archive(self, run):
        return os.path.join(self.repo, f"{run}.tar")

    def backup(self, source, run):
        return self.make(["cf", self.archive(run), "-C", source, "."])

    def unchanged(self, source, run):
        return None

    def restore(self, source, run, to):
        os.makedirs(to)
        return self.make(["xpf", self.archive(run), "-C", to])

    def one_file(self, source, run, file, to):
        return self.make(["xpf", self.archive(run), "-C", to, f"./{file}"])


class Source(Tool):
    """The tree itself, read where it is: nothing can tell what changed faster than `find`, and no
    mount is faster than the file system."""

    name = "source"
    is_peer = False

    def version(self):
        return "find, tar and cat of the tree itself"

    def unchanged(self, source, run):
        return Step(["find", source, "-printf", "%s %T@ %C@ %i\n"], accepted=(0, 1))

    def verify(self, source):
        return piped_tar(source)

    def mount_root(self, run, point):
        return None


def piped_tar(directory):
    """Reads a tree by tar. Through a pipe: tar does not read files if it writes to /dev/null."""
    script = 'set -o pipefail; tar cf - -C "$1" . | cat >/dev/null'
    return Step(["bash", "-c", script, "bash", directory], accepted=(0, 1, 2))


def listing(directory):
    return Step(["find", directory, "-printf", "%s %m %T@\n"], accepted=(0, 1))


# --- Other backup programs --------------------------------------------------------------------


class Restic(Tool):
    name = "restic"
    variable = "RESTIC_BIN"
    accepted = (0, 3)

    def version(self):
        return quiet(Step([self.program, "version"])).splitlines()[0]

    def init(self):
        super().init()
        self.env = {
            "RESTIC_REPOSITORY": self.repo,
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": os.path.join(self.state, "cache"),
        }
        quiet(self.make(["init", "--repository-version", "2"]))

    def backup(self, source, run):
        return self.make(["--quiet", "backup", "--tag", f"r{run}", "."], source)

    def restore(self, source, run, to):
        return self.make(["--quiet", "restore", "latest", "--tag", f"r{run}", "--target", to])

    def one_file(self, source, run, file, to):
        words = ["--quiet", "restore", "latest", "--tag", f"r{run}"]
        return self.make([*words, "--include", f"/{file}", "--target", to])

    def verify(self, source):
        return self.make(["--quiet", "check", "--read-data"])

    def mount(self, run, point):
        return self.make(["--quiet", "mount", "--path-template", "tags/%t", point])

    def mount_root(self, run, point):
        return os.path.join(point, "tags", f"r{run}")


class Rustic(Tool):
    name = "rustic"
    variable = "RUSTIC_BIN"

    def init(self):
        super().init()
        self.env = {
            "RUSTIC_REPOSITORY": self.repo,
            "RUSTIC_PASSWORD": "bench",
            "RUSTIC_CACHE_DIR": os.path.join(self.state, "cache"),
            "RUSTIC_NO_PROGRESS": "true",
            "RUSTIC_LOG_LEVEL": "warn",
            "HOME": self.state,
        }
        quiet(self.make(["init"]))

    def backup(self, source, run):
        return self.make(["backup", "--as-path", "/", "--tag", f"r{run}", "."], source)

    def restore(self, source, run, to):
        return self.make(["restore", "--filter-tags", f"r{run}", "latest:/", to])

    def one_file(self, source, run, file, to):
        to = os.path.join(to, "file")
        return self.make(["restore", "--filter-tags", f"r{run}", f"latest:/{file}", to])

    def verify(self, source):
        return self.make(["check", "--read-data"])


class Borg(Tool):
    name = "borg"
    variable = "BORG_BIN"
    accepted = (0, 1)

    def init(self):
        super().init()
        self.env = {
            "BORG_REPO": self.repo,
            "BORG_BASE_DIR": self.state,
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        quiet(self.make(["init", "-e", "none"]))

    def backup(self, source, run):
        return self.make(["create", f"::r{run}", "."], source)

    def restore(self, source, run, to):
        os.makedirs(to)
        return self.make(["extract", f"::r{run}"], to)

    def one_file(self, source, run, file, to):
        return self.make(["extract", f"::r{run}", file], to)

    def verify(self, source):
        return self.make(["check", "--verify-data"])

    def mount(self, run, point):
        return self.make(["mount", "-f", f"::r{run}", point])


class Bupstash(Tool):
    name = "bupstash"
    variable = "BUPSTASH_BIN"

    def init(self):
        super().init()
        self.env = {
            "BUPSTASH_REPOSITORY": self.repo,
            "BUPSTASH_KEY": os.path.join(self.state, "key"),
            "BUPSTASH_QUERY_CACHE": os.path.join(self.state, "query-cache"),
            "BUPSTASH_SEND_LOG": os.path.join(self.state, "send-log"),
        }
        quiet(self.make(["init", "-r", self.repo]))
        quiet(self.make(["new-key", "-o", self.env["BUPSTASH_KEY"]]))

    def backup(self, source, run):
        return self.make(["put", "--no-progress", "--xattrs", f"name=r{run}", source])

    def restore(self, source, run, to):
        os.makedirs(to)
        words = ["restore", "--no-progress", "--ownership", "--xattrs", "--into", to]
        return self.make([*words, f"name=r{run}"])

    def one_file(self, source, run, file, to):
        return self.make(["get", "--no-progress", "--pick", file, f"name=r{run}"])


class Conserve(Tool):
    name = "conserve"
    variable = "CONSERVE_BIN"

    def init(self):
        super().init()
        quiet(self.make(["init", self.repo]))

    def backup(self, source, run):
        return self.make(["backup", "--no-progress", "--no-stats", self.repo, source])

    def back(self, run, *words):
        # Its runs are b0000, b0001 and so on.
        band = f"b{run - 1:04}"
        return self.make(["restore", "--no-progress", "--no-stats", "-b", band, *words])

    def restore(self, source, run, to):
        return self.back(run, self.repo, to)

    def one_file(self, source, run, file, to):
        return self.back(run, "--force-overwrite", "--only", f"/{file}", self.repo, to)

    def verify(self, source):
        return self.make(["validate", "--no-progress", "--no-stats", self.repo])


PEERS = [Restic, Rustic, Borg, Bupstash, Conserve]


def find_peers(wanted):
    """Classes and programs of the peers that are there, and the names of those that are not."""
    found, missing = [], []
    for peer in PEERS:
        if wanted is not None and peer.name not in wanted:
            continue
        named = os.environ.get(peer.variable)
        program = shutil.which(named or peer.name)
        if program:
            found.append((peer, program))
        else:
            where = f"as {peer.variable}={named}" if named else f"on the path or by {peer.variable}"
            missing.append((peer.name, f"not found {where}"))
    return found, missing
