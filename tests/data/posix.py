"""Does what programs do to files in the current directory, and says what came of it.

Run in two directories, one of them known to be right, the answers have to be the same. Nothing in
them depends on where or when it runs. As root it acts as nobody in between; both directories have
to be open to everybody then.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
libc.telldir.argtypes = libc.closedir.argtypes = libc.readdir.argtypes = [ctypes.c_void_p]
libc.telldir.restype = ctypes.c_long
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
ROOT = os.geteuid() == 0


def tell(what, *answers):
    print(f"{what}:", *answers)


def tried(call, *args, **more):
    """What a call gives, or the name of its error."""
    try:
        return call(*args, **more)
    except OSError as e:
        return errno.errorcode[e.errno]


def make(name, content=b"", mode=0o644):
    with open(name, "wb") as file:
        file.write(content)
    os.chmod(name, mode)
    return name


def mode_of(name):
    return oct(os.lstat(name).st_mode)


def in_child(call):
    """The exit code of a process that does this."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = call()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_nobody(call):
    def act():
        if ROOT:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        try:
            call()
            return 0
        except OSError as e:
            return e.errno

    return in_child(act)


def locks():
    name = make("locked", b"0" * 100)
    with open(name, "r+b") as file:

        def other(lock, *args):
            def act():
                with open(name, "r+b") as again:
                    try:
                        lock(again, *args)
                        return 0
                    except OSError as e:
                        return e.errno

            return in_child(act)

        fcntl.flock(file, fcntl.LOCK_EX)
        tell("flock held", other(fcntl.flock, fcntl.LOCK_SH | fcntl.LOCK_NB))
        fcntl.flock(file, fcntl.LOCK_SH)
        tell("flock shared", other(fcntl.flock, fcntl.LOCK_SH | fcntl.LOCK_NB))
        tell("flock above shared", other(fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)
        busy = fcntl.LOCK_EX | fcntl.LOCK_NB
        tell("range held", other(fcntl.lockf, busy, 5, 22), other(fcntl.lockf, busy, 5, 40))
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 20)
        tell("range free", other(fcntl.lockf, busy, 5, 22))


def contents():
    name = "content"
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o640)
    os.pwrite(fd, b"end", 5 << 20)
    os.pwrite(fd, b"start", 0)
    found = os.lseek(fd, 100_000, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE)
    tell("holes", os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512 < 1 << 20, *found)
    tell("past the end", tried(os.lseek, fd, 6 << 20, os.SEEK_DATA))
    with open(name, "ab") as end:
        end.write(b" and more")
        end.seek(0)
        end.write(b"!")
    tell("appended", os.pread(fd, 20, 5 << 20))
    os.ftruncate(fd, 4096)
    view = mmap.mmap(fd, 4096)
    view[10:16] = b"mapped"
    tell("read beside the map", os.pread(fd, 8, 9))
    os.pwrite(fd, b"written", 20)
    tell("mapped beside the write", view[19:28])
    view.flush()
    view.close()
    tell("blocks given", tried(os.posix_fallocate, fd, 0, 100_000), os.fstat(fd).st_size)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    tell("hole punched", libc.fallocate(fd, 3, 4096, 8192), os.lseek(fd, 0, os.SEEK_HOLE))
    copy = os.open("copy", os.O_RDWR | os.O_CREAT, 0o600)
    tell("copied", os.copy_file_range(fd, copy, 4096, 0, 0), os.pread(copy, 6, 10))
    tell("sent", os.sendfile(copy, fd, 0, 4096), os.fstat(copy).st_size)
    os.close(copy)
    direct = tried(os.open, "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    page = mmap.mmap(-1, 4096)
    page[:] = b"d" * 4096
    tell("direct", tried(os.writev, direct, [page]), tried(os.preadv, direct, [page], 0))
    os.close(direct)
    os.close(fd)
    tell("a byte too far", tried(os.truncate, name, 1 << 62), tried(os.truncate, name, -1))


def names():
    make("a", b"a")
    os.link("a", "b")
    tell("links", os.stat("a").st_nlink, os.path.samefile("a", "b"), tried(os.link, "a", "b"))
    held = open("b", "r+b")
    make("c", b"c")
    os.rename("c", "b")
    held.write(b"A")
    held.flush()
    tell("renamed over an open file", open("a", "rb").read(), open("b", "rb").read())
    os.unlink("a")
    held.seek(0)
    tell("unlinked", held.read(), os.fstat(held.fileno()).st_nlink)
    held.close()
    for length in (255, 256):
        name = "n" * length
        tell(length, tried(os.mkdir, name), tried(os.open, name, os.O_CREAT | os.O_WRONLY))
    tell("symlink", tried(os.symlink, "t" * 4095, "long link"), tried(os.symlink, "", "empty"))
    os.symlink("loop", "loop")
    tell("loop", tried(os.stat, "loop"), tried(os.open, "loop", os.O_RDONLY | os.O_NOFOLLOW))
    os.mkdir("one")
    os.mkdir("one/two")
    tell("not empty", tried(os.rmdir, "one"), tried(os.rename, "one", "one/two/three"))
    tell("wrong kind", tried(os.unlink, "one"), tried(os.rmdir, "b"), tried(os.rename, "b", "one"))
    rename = libc.renameat2
    for old, new, flags in (("b", "one", 1), ("b", "one", 2), ("b", "none", 2), ("b", "none", 1)):
        done = rename(-100, old.encode(), -100, new.encode(), flags)
        tell("renameat2", flags, done, errno.errorcode.get(done and ctypes.get_errno()))
    tell("after", sorted(it for it in os.listdir(".") if len(it) < 20))


def modes():
    os.umask(0o027)
    os.mkdir("plain")
    fd = os.open("masked", os.O_CREAT | os.O_WRONLY, 0o777)
    os.close(fd)
    tell("masked", mode_of("plain"), mode_of("masked"))
    os.umask(0)
    os.mkdir("group")
    if ROOT:
        os.chown("group", 0, 44)
    os.chmod("group", 0o2777)
    os.mkdir("group/sub")
    make("group/file")
    inherits = os.stat("group/file").st_gid == os.stat("group").st_gid
    tell("setgid", mode_of("group/sub"), inherits)
    as_nobody(lambda: os.close(os.open("group/theirs", os.O_CREAT | os.O_WRONLY, 0o2775)))
    same = os.stat("group/theirs").st_gid == os.stat("group").st_gid
    tell("theirs", mode_of("group/theirs"), same)
    # Writing and changing the owner take the power to act as somebody else away.
    for name in ("by write", "by truncation", "by owner", "by map"):
        make(name, b"x" * 4096)
        os.chmod(name, 0o6777)

    def write():
        with open("by write", "r+b") as file:
            file.write(b"y")

    def map_it():
        with open("by map", "r+b") as file, mmap.mmap(file.fileno(), 4096) as view:
            view[0] = 1
            view.flush()

    as_nobody(write)
    as_nobody(lambda: os.truncate("by truncation", 1))
    as_nobody(map_it)
    if ROOT:
        os.chown("by owner", 65534, 65534)
    for name in ("by write", "by truncation", "by owner", "by map"):
        tell(name, mode_of(name))
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    make("sticky/ours", mode=0o666)
    tell("sticky", as_nobody(lambda: os.unlink("sticky/ours")))
    tell("sticky rename", as_nobody(lambda: os.rename("sticky/ours", "sticky/theirs")))
    tell("their own", as_nobody(lambda: (open("sticky/n", "w"), os.unlink("sticky/n"))))
    make("closed", b"secret", 0o600)
    tell("closed", as_nobody(lambda: open("closed")))
    os.mkdir("shut", 0o700)
    make("shut/in")
    tell("shut", as_nobody(lambda: open("shut/in")), as_nobody(lambda: os.listdir("shut")))
    tell("not theirs", as_nobody(lambda: os.chmod("closed", 0o777)))


def times():
    make("t")
    before = os.stat("t")
    os.utime("t", ns=(1_000_000_001, 2_000_000_002))
    now = os.stat("t")
    tell("set", now.st_atime_ns, now.st_mtime_ns, now.st_ctime_ns >= before.st_ctime_ns)
    subprocess.run(["touch", "-a", "t"], check=True)
    tell("only one", os.stat("t").st_mtime_ns, os.stat("t").st_atime_ns > 1_000_000_001)
    os.utime("t", ns=(-1_500_000_000, -1))
    tell("before 1970", os.stat("t").st_mtime_ns // 1_000_000_000)
    tell("whose", as_nobody(lambda: os.utime("t", ns=(0, 0))), as_nobody(lambda: os.utime("t")))
    first = os.stat(".").st_mtime_ns
    time.sleep(0.02)
    make("new")
    tell("of the directory", os.stat(".").st_mtime_ns > first)


def attributes():
    make("x")
    os.setxattr("x", "user.k", b"\0value")
    tell("value", os.getxattr("x", "user.k"), os.listxattr("x"))
    tell("create", tried(os.setxattr, "x", "user.k", b"", os.XATTR_CREATE))
    tell("replace", tried(os.setxattr, "x", "user.n", b"", os.XATTR_REPLACE))
    tell("none", tried(os.getxattr, "x", "user.n"), tried(os.removexattr, "x", "user.n"))
    tell("odd", tried(os.setxattr, "x", "nothing.k", b""), tried(os.setxattr, "x", "user.", b""))
    os.symlink("x", "l")
    tell("link", tried(os.setxattr, "l", "user.k", b"", follow_symlinks=False))
    subprocess.run(["setfacl", "-m", "u:65534:rw", "x"], check=True)
    os.mkdir("handed")
    subprocess.run(["setfacl", "-d", "-m", "u:65534:rwx,o::-", "handed"], check=True)
    make_in = os.open("handed/in", os.O_CREAT | os.O_WRONLY, 0o666)
    os.close(make_in)
    tell("acl", mode_of("x"), mode_of("handed/in"))
    os.chmod("x", 0o604)
    got = subprocess.run(["getfacl", "-nc", "x", "handed/in"], capture_output=True, check=True)
    tell("list", got.stdout)
    os.chmod("x", 0o660)
    tell("lets in", as_nobody(lambda: open("x", "r+")))


def listing():
    os.mkdir("many")
    stay = {f"stays{n:05}" for n in range(10_000)}
    for name in stay:
        os.close(os.open(f"many/{name}", os.O_CREAT | os.O_WRONLY))
    tell("many", len(os.listdir("many")), set(os.listdir("many")) == stay)
    # What is there all the time is seen once, whatever else comes and goes.
    seen = []
    for count, entry in enumerate(os.scandir("many")):
        seen.append(entry.name)
        if count % 3 == 0:
            make(f"many/comes{count}")
        if count % 6 == 0 and count:
            os.unlink(f"many/comes{count - 3}")
    tell("meanwhile", {it for it in seen if it in stay} == stay, len(seen) == len(set(seen)))
    # Where a name was, it is found again.
    handle = libc.opendir(b"many")
    places = []
    while True:
        place = libc.telldir(handle)
        found = libc.readdir(handle)
        if not found:
            break
        places.append((place, ctypes.string_at(found + 19)))
    wrong = 0
    for place, name in places[::97] + places[::-61]:
        libc.seekdir(handle, place)
        wrong += ctypes.string_at(libc.readdir(handle) + 19) != name
    libc.closedir(handle)
    tell("found again", wrong, len(places) == len(set(places)))
    space = os.statvfs(".")
    tell("space", space.f_bfree <= space.f_blocks, space.f_namemax, space.f_files > 0)


for part in (locks, contents, names, modes, times, attributes, listing):
    os.mkdir(part.__name__)
    os.chmod(part.__name__, 0o777)
    os.chdir(part.__name__)
    part()
    os.chdir("..")
sys.stdout.flush()
