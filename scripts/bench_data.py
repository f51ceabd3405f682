"""Trees to measure on: a generated one, and the same changes to any tree. Used by scripts/bench."""

import os
import random
import stat

WORDS = [b"tape", b"disk", b"block", b"return", b"struct", b"let", b"self", b"offset", b"volume"]


def text(pick, size):
    """Lines of words, which compress about as well as program sources."""
    lines = []
    while size > 0:
        line = b" ".join(pick.choice(WORDS) + b"%d" % pick.randrange(99) for _ in range(8)) + b"\n"
        lines.append(line)
        size -= len(line)
    return b"".join(lines)


def generate(place, files, seed=1):
    """A tree of `files` small files (text, some noise, a tenth twice) and three large ones."""
    pick = random.Random(seed)
    stock = text(pick, 4 << 20)
    last = b""
    for number in range(files):
        folder = os.path.join(place, f"part{number // 2000}", f"folder {number // 50 % 40}")
        os.makedirs(folder, exist_ok=True)
        size = int(pick.paretovariate(1.2) * 1_500) % 300_000
        start = pick.randrange(len(stock) - size)
        kind = pick.randrange(10)
        if kind > 0:
            last = pick.randbytes(size) if kind == 1 else b"%d\n" % number + stock[start:][:size]
        with open(os.path.join(folder, f"file {number}.txt"), "wb") as file:
            file.write(last)
    image = bytearray(pick.randbytes(24 << 20) + stock * 6 + bytes(16 << 20))
    write(os.path.join(place, "large.img"), image)
    image[5 << 20 : 5 << 20] = b"inserted"
    write(os.path.join(place, "nearly the same.img"), image)
    write(os.path.join(place, "log.txt"), text(pick, 24 << 20))


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def files_of(place):
    """All regular files of a tree in a settled order, as (path, size)."""
    found = []
    for base, dirs, names in os.walk(place):
        dirs.sort()
        for name in sorted(names):
            path = os.path.join(base, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):
                found.append((path, info.st_size))
    return found


def change(place, seed=2):
    """One in a hundred of the small files is edited, deleted, renamed, or joined by a new one;
    large files are edited in some places, and something is inserted."""
    pick = random.Random(seed)
    files = files_of(place)
    small = [it for it in files if it[1] < 8 << 20]
    pick.shuffle(small)
    share = max(1, len(small) // 100)
    for path, size in small[:share]:
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(b"an edit")
    for path, _ in small[share : 2 * share]:
        os.unlink(path)
    for path, _ in small[2 * share : 3 * share]:
        os.rename(path, path + ".renamed")
    for path, size in small[3 * share : 4 * share]:
        write(path + ".new", text(pick, min(size, 20_000)))
    for path, size in files:
        if size < 8 << 20:
            continue
        with open(path, "r+b") as file:
            for _ in range(4):
                file.seek(pick.randrange(size - 5_000))
                file.write(pick.randbytes(4_096))
            at = pick.randrange(size)
            file.seek(at)
            rest = file.read()
            file.seek(at)
            file.write(b"inserted here\n" + rest)


def million(place, count):
    """`count` tiny files, a thousand in each directory. Gives one directory in the middle."""
    folder = place
    for number in range(count):
        if number % 1_000 == 0:
            folder = os.path.join(place, f"group {number // 100_000}", f"{number // 1_000}")
            os.makedirs(folder)
        handle = os.open(f"{folder}/{number}.dat", os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(handle, b"%d" % number)
        os.close(handle)
    middle = count // 2_000
    return os.path.join(f"group {middle // 100}", f"{middle}")


def generate_small(place, files=20):
    """A few tiny files, for runs of which there are to be many."""
    os.makedirs(place)
    for number in range(files):
        write(os.path.join(place, f"{number}"), b"%d\n" % number)
