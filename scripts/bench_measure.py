"""Running one command and saying what it took: wall time, CPU seconds of all its processes, peak
memory. Used by scripts/bench."""

import os
import resource
import subprocess
import sys
import threading
import time

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """Something that ends the run, told without a stack trace."""


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


# --- Caches -----------------------------------------------------------------------------------


def drop_caches():
    """Makes the next step a cold one. Whether that could be done."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3\n")
    except OSError:
        return False
    return True


# --- Processes --------------------------------------------------------------------------------


def tree_of(pid):
    """A process and all below it."""
    found, left = [], [pid]
    while left:
        pid = left.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                    left += [int(child) for child in file.read().split()]
        except OSError:
            pass
    return found


def rss(pid):
    """Memory that a process and all below it hold now."""
    total = 0
    for each in tree_of(pid):
        try:
            with open(f"/proc/{each}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1]) * PAGE
        except (OSError, IndexError, ValueError):
            pass
    return total


def cpu_seconds(pid):
    """What a living process and all below it have used, with their children that have ended."""
    total = 0
    for each in tree_of(pid):
        try:
            with open(f"/proc/{each}/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            total += sum(int(field) for field in fields[11:15])
        except (OSError, IndexError, ValueError):
            pass
    return total / TICKS


class Peak:
    """Looks at a process's memory again and again, until told to stop.

    The kernel's own figure (ru_maxrss) is no use for small programs: a child begins as a copy of
    this interpreter, and what that held counts as the child's peak.
    """

    def __init__(self, pid):
        self.pid = pid
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        wait = 0.002
        while not self._done.wait(wait):
            self.bytes = max(self.bytes, rss(self.pid))
            wait = min(wait * 1.5, 0.05)

    def stop(self):
        self._done.set()
        self._thread.join()
        return self.bytes


def run(step, log_path):
    """Runs a command (see `Step`) to its end; gives its figures."""
    with open(log_path, "wb") as log:
        start = time.monotonic()
        child = start_child(step, log)
        peak = Peak(child.pid)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            peak_bytes = peak.stop()
        seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if used.ru_maxrss * 1024 > floor:
        peak_bytes = max(peak_bytes, used.ru_maxrss * 1024)
    start = time.monotonic()
    os.sync()
    row = {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 4),
        "peak_bytes": peak_bytes,
        # What is left to the disk when the command says that it is done.
        "sync_seconds": round(time.monotonic() - start, 4),
    }
    if child.returncode not in step.accepted:
        row["failed"] = f"code {child.returncode}: {last_line(log_path)}"
    return row


class Step:
    """A command with the directory, the environment and the exit codes that go with it."""

    def __init__(self, command, cwd=None, env=None, accepted=(0,)):
        self.command = [os.fspath(word) for word in command]
        self.cwd = cwd
        self.env = env or {}
        self.accepted = accepted


def start_child(step, log, **more):
    env = dict(os.environ, LC_ALL="C.UTF-8", **step.env)
    stdout = more.pop("stdout", log)
    return subprocess.Popen(
        step.command,
        cwd=step.cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=log,
        **more,
    )


def last_line(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read()[-4000:].strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def quiet(step):
    """Runs a command that is not measured and has to work."""
    env = dict(os.environ, LC_ALL="C.UTF-8", **step.env)
    done = subprocess.run(
        step.command,
        cwd=step.cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode not in step.accepted:
        words = " ".join(step.command)
        raise Failed(f"code {done.returncode}: {words}\n{done.stderr.strip()}")
    return done.stdout
