//! Tests of the ingest tree: each rule of its own, then random operations against a second
//! directory to which the kernel does the same directly.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::sync::atomic::AtomicBool;

use super::*;
use crate::sys::Time;
use tempfile::TempDir;

const O_RDWR: i32 = c::O_RDWR;

struct Tree {
    dir: TempDir,
    fs: Ingest,
}

fn tree(limit: usize) -> Tree {
    let dir = tempfile::tempdir().unwrap();
    let fs = Ingest::with_fd_limit(&dir.path().join("ingest"), limit).unwrap();
    Tree { dir, fs }
}

fn os(name: &str) -> &OsStr {
    OsStr::new(name)
}

fn me() -> Caller {
    Caller { uid: sys::effective_uid(), gid: sys::effective_gid(), umask: 0o022 }
}

fn errno<T: std::fmt::Debug>(result: FsResult<T>) -> i32 {
    result.unwrap_err().0
}

impl Tree {
    /// The same place, past the tree.
    fn disk(&self, path: &str) -> std::path::PathBuf {
        self.dir.path().join("ingest").join(path)
    }

    fn root(&self) -> u64 {
        self.fs.root()
    }

    fn make(&self, parent: u64, name: &str, content: &[u8]) -> u64 {
        let (stat, handle) = self.fs.create(&me(), parent, os(name), 0o644, O_RDWR).unwrap();
        assert_eq!(self.fs.write(handle, 0, content), Ok(content.len()));
        self.fs.release(handle).unwrap();
        stat.ino
    }

    fn mkdir(&self, parent: u64, name: &str) -> u64 {
        self.fs.mkdir(&me(), parent, os(name), 0o755).unwrap().ino
    }

    fn read_handle(&self, handle: u64) -> Vec<u8> {
        let mut buf = vec![0; 1 << 16];
        let len = self.fs.read(handle, 0, &mut buf).unwrap();
        buf.truncate(len);
        buf
    }

    fn read(&self, node: u64) -> Vec<u8> {
        let handle = self.fs.open(node, c::O_RDONLY).unwrap();
        let content = self.read_handle(handle);
        self.fs.release(handle).unwrap();
        content
    }

    fn verify(&self) {
        self.fs.nodes.verify();
    }
}

#[test]
fn the_root_is_created_for_its_owner_alone_and_links_are_refused() {
    let t = tree(8);
    assert_eq!(fs::metadata(t.disk("")).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(t.root(), fs::metadata(t.disk("")).unwrap().ino());
    t.make(t.root(), "a", b"x");
    let again = Ingest::new(&t.disk("")).unwrap();
    assert_eq!(again.lookup(again.root(), os("a")), t.fs.getattr(node(&t, "a"), None));
    std::os::unix::fs::symlink(t.disk(""), t.dir.path().join("link")).unwrap();
    assert!(Ingest::new(&t.dir.path().join("link")).is_err());
    assert!(Ingest::new(&t.disk("a")).is_err());
    assert!(Ingest::new(&t.disk("no/such")).is_err());
}

fn node(t: &Tree, name: &str) -> u64 {
    t.fs.lookup(t.root(), os(name)).unwrap().ino
}

#[test]
fn offsets_hold_even_with_o_append() {
    let t = tree(8);
    let flags = O_RDWR | c::O_APPEND | c::O_EXCL | c::O_DIRECT;
    let (stat, handle) = t.fs.create(&me(), t.root(), os("a"), 0o644, flags).unwrap();
    assert_eq!(t.fs.write(handle, 0, b"hello"), Ok(5));
    assert_eq!(t.fs.write(handle, 5, b" world"), Ok(6));
    assert_eq!(t.fs.write(handle, 0, b"J"), Ok(1));
    t.fs.release(handle).unwrap();
    assert_eq!(t.read(stat.ino), b"Jello world");
    let handle = t.fs.open(stat.ino, c::O_WRONLY | c::O_APPEND).unwrap();
    assert_eq!(t.fs.write(handle, 1, b"a"), Ok(1));
    assert_eq!(errno(t.fs.read(handle, 0, &mut [0; 4])), c::EBADF);
    t.fs.release(handle).unwrap();
    let handle = t.fs.open(stat.ino, c::O_RDONLY).unwrap();
    assert_eq!(t.read_handle(handle), b"Jallo world");
    let mut buf = [0; 4];
    assert_eq!(t.fs.read(handle, 9, &mut buf), Ok(2));
    assert_eq!(t.fs.read(handle, 11, &mut buf), Ok(0));
    assert_eq!(t.fs.read(handle, 1 << 40, &mut buf), Ok(0));
    assert_eq!(errno(t.fs.read(handle, 1 << 63, &mut buf)), c::EINVAL);
    assert_eq!(errno(t.fs.write(handle, 0, b"x")), c::EBADF);
    for (done, error) in [
        (t.fs.flush(handle), None),
        (t.fs.fsync(handle, true), None),
        (t.fs.fsync(handle, false), None),
        (t.fs.release(handle), None),
        (t.fs.release(handle), Some(c::EBADF)),
        (t.fs.flush(handle), Some(c::EBADF)),
        (t.fs.fsync(handle, false), Some(c::EBADF)),
    ] {
        assert_eq!(done.err().map(|e| e.0), error);
    }
    t.verify();
}

#[test]
fn create_honours_its_flags_and_meets_what_is_there() {
    let t = tree(8);
    let root = t.root();
    let a = t.make(root, "a", b"content");
    let create = |name, flags| t.fs.create(&me(), root, os(name), 0o644, flags);
    assert_eq!(errno(create("a", O_RDWR | c::O_EXCL)), c::EEXIST);
    let (stat, handle) = create("a", O_RDWR).unwrap();
    assert_eq!((stat.ino, stat.size), (a, 7));
    assert_eq!(t.read_handle(handle), b"content");
    let (stat, truncated) = create("a", O_RDWR | c::O_TRUNC).unwrap();
    assert_eq!((stat.ino, stat.size), (a, 0));
    t.fs.write(truncated, 0, b"new").unwrap();
    assert_eq!(t.read_handle(handle), b"new");
    let third = t.fs.open(a, c::O_WRONLY | c::O_TRUNC).unwrap();
    assert_eq!(t.read_handle(handle), b"");
    t.mkdir(root, "d");
    t.fs.mknod(&me(), root, os("fifo"), c::S_IFIFO | 0o600, 0).unwrap();
    t.fs.symlink(&me(), root, os("link"), os("a")).unwrap();
    assert_eq!(errno(create("d", O_RDWR)), c::EISDIR);
    assert_eq!(errno(create("fifo", c::O_WRONLY)), c::ESTALE);
    assert_eq!(errno(create("link", O_RDWR)), c::ESTALE);
    assert_eq!(errno(t.fs.open(node(&t, "d"), O_RDWR)), c::EISDIR);
    assert_eq!(errno(t.fs.open(node(&t, "fifo"), c::O_WRONLY)), c::EINVAL);
    assert_eq!(errno(t.fs.open(node(&t, "link"), c::O_RDONLY)), c::EINVAL);
    for handle in [handle, truncated, third] {
        t.fs.release(handle).unwrap();
    }
    // A file may forbid its own creator to write, once it is open.
    let (stat, handle) = t.fs.create(&me(), root, os("ro"), 0o444, O_RDWR).unwrap();
    t.fs.write(handle, 0, b"x").unwrap();
    let change = SetAttr { size: Some(9), ..SetAttr::default() };
    assert_eq!(t.fs.setattr(stat.ino, Some(handle), &change).unwrap().size, 9);
    t.verify();
}

#[test]
fn a_renamed_node_keeps_working() {
    for limit in [0, 100] {
        let t = tree(limit);
        let root = t.root();
        let (d, e) = (t.mkdir(root, "d"), t.mkdir(root, "e"));
        let sub = t.mkdir(d, "sub");
        let file = t.make(sub, "file", b"1");
        t.fs.rename(sub, os("file"), e, os("moved"), 0).unwrap();
        assert_eq!(t.read(file), b"1");
        let deep = t.make(sub, "deep", b"2");
        t.fs.rename(d, os("sub"), e, os("sub2"), 0).unwrap();
        t.fs.rename(root, os("e"), d, os("e2"), c::RENAME_NOREPLACE).unwrap();
        assert_eq!(t.read(file), b"1");
        assert_eq!(t.read(deep), b"2");
        assert_eq!(fs::read(t.disk("d/e2/sub2/deep")).unwrap(), b"2");
        assert_eq!(errno(t.fs.rename(root, os("d"), sub, os("x"), 0)), c::EINVAL);
        t.verify();
    }
}

#[test]
fn rename_over_leaves_the_victim_to_those_who_hold_it() {
    for limit in [0, 100] {
        let t = tree(limit);
        let root = t.root();
        let (a, b) = (t.make(root, "a", b"aa"), t.make(root, "b", b"bb"));
        assert_eq!(
            errno(t.fs.rename(root, os("a"), root, os("b"), c::RENAME_NOREPLACE)),
            c::EEXIST
        );
        let handle = t.fs.open(b, O_RDWR).unwrap();
        t.fs.rename(root, os("a"), root, os("b"), 0).unwrap();
        assert_eq!(t.read_handle(handle), b"bb");
        assert_eq!(t.read(b), b"bb");
        assert_eq!(t.fs.getattr(b, None).unwrap().nlink, 0);
        assert_eq!(t.fs.lookup(root, os("b")).unwrap().ino, a);
        assert_eq!(errno(t.fs.lookup(root, os("a"))), c::ENOENT);
        t.fs.release(handle).unwrap();
        assert_eq!(t.read(b), b"bb");
        t.verify();
        t.fs.forget(b, 1);
        assert_eq!(errno(t.fs.getattr(b, None)), c::ESTALE);
        // Directories: only over an empty one, which is gone then.
        let (d, e) = (t.mkdir(root, "d"), t.mkdir(root, "e"));
        t.fs.rename(root, os("d"), root, os("e"), 0).unwrap();
        assert_eq!(t.fs.lookup(root, os("e")).unwrap().ino, d);
        assert_eq!(t.fs.getattr(e, None).unwrap().ino, e);
        assert_eq!(errno(t.fs.mkdir(&me(), e, os("x"), 0o755)), c::ENOENT);
        t.verify();
    }
}

#[test]
fn exchange_swaps_names_even_of_a_file_and_a_directory() {
    for limit in [0, 100] {
        let t = tree(limit);
        let root = t.root();
        let d = t.mkdir(root, "d");
        let inner = t.make(d, "inner", b"in");
        let f = t.make(root, "f", b"ff");
        let swap = |a, b| t.fs.rename(root, os(a), root, os(b), c::RENAME_EXCHANGE);
        swap("f", "d").unwrap();
        assert_eq!(t.read(inner), b"in");
        assert_eq!(fs::read(t.disk("f/inner")).unwrap(), b"in");
        assert_eq!(t.read(f), b"ff");
        assert_eq!(t.fs.lookup(root, os("d")).unwrap().ino, f);
        assert_eq!(errno(swap("f", "none")), c::ENOENT);
        let both = c::RENAME_EXCHANGE | c::RENAME_NOREPLACE;
        assert_eq!(errno(t.fs.rename(root, os("f"), root, os("d"), both)), c::EINVAL);
        assert_eq!(errno(t.fs.rename(root, os("f"), root, os("w"), 4)), c::EINVAL);
        t.verify();
    }
}

#[test]
fn what_was_cleared_is_not_changed_by_the_name_it_had() {
    let t = tree(100);
    let node = t.make(t.root(), "a", b"stored");
    t.fs.lookup(t.root(), os("a")).unwrap();
    t.fs.unlink(t.root(), os("a")).unwrap();
    let size = SetAttr { size: Some(0), ..SetAttr::default() };
    // Whoever has removed it himself may go on with it, by /proc/self/fd for instance.
    t.fs.release(t.fs.open(node, c::O_WRONLY).unwrap()).unwrap();
    t.fs.changes.took(node);
    assert_eq!(errno(t.fs.open(node, c::O_WRONLY)), c::ESTALE);
    assert_eq!(errno(t.fs.setattr(node, None, &size)), c::ESTALE);
    assert_eq!(errno(t.fs.setxattr(node, os("user.x"), b"x", 0)), c::ESTALE);
    let handle = t.fs.open(node, c::O_RDONLY).unwrap();
    assert_eq!(t.read_handle(handle), b"stored");
    t.fs.release(handle).unwrap();
}

#[test]
fn an_unlinked_file_lives_as_long_as_it_is_held() {
    let t = tree(0);
    let root = t.root();
    let d = t.mkdir(root, "d");
    let a = t.make(d, "a", b"1234");
    let handle = t.fs.open(a, O_RDWR).unwrap();
    t.fs.unlink(d, os("a")).unwrap();
    t.fs.rmdir(root, os("d")).unwrap();
    assert_eq!(t.fs.getattr(a, None).unwrap().nlink, 0);
    assert_eq!(t.fs.getattr(a, Some(handle)).unwrap().size, 4);
    assert_eq!(t.fs.write(handle, 4, b"56"), Ok(2));
    assert_eq!(t.read_handle(handle), b"123456");
    let change = SetAttr { size: Some(2), mode: Some(0o600), ..SetAttr::default() };
    assert_eq!(t.fs.setattr(a, None, &change).unwrap().size, 2);
    assert_eq!(t.read(a), b"12");
    assert_eq!(errno(t.fs.link(a, root, os("again"))), c::ENOENT);
    t.verify();
    t.fs.forget(a, 1);
    assert_eq!(t.read_handle(handle), b"12");
    t.fs.release(handle).unwrap();
    // A directory that is somebody's working directory.
    assert_eq!(t.fs.getattr(d, None).unwrap().nlink, 0);
    assert_eq!(errno(t.fs.lookup(d, os("a"))), c::ENOENT);
    assert_eq!(t.fs.nodes.count(), 2);
    t.fs.forget(d, 1);
    assert_eq!(t.fs.nodes.count(), 1);
    t.verify();
}

#[test]
fn a_hard_link_outlives_the_name_it_was_found_by() {
    for limit in [0, 100] {
        let t = tree(limit);
        let root = t.root();
        let d = t.mkdir(root, "d");
        let a = t.make(root, "a", b"x");
        let linked = t.fs.link(a, d, os("b")).unwrap();
        assert_eq!((linked.ino, linked.nlink), (a, 2));
        t.fs.unlink(root, os("a")).unwrap();
        assert_eq!(t.read(a), b"x");
        // The name's directory may be forgotten: it is needed all the same.
        t.fs.forget(d, 1);
        assert_eq!(t.read(a), b"x");
        for n in 0..30 {
            t.fs.link(a, root, os(&format!("l{n}"))).unwrap();
            t.verify();
        }
        for n in 0..29 {
            t.fs.unlink(root, os(&format!("l{n}"))).unwrap();
        }
        assert_eq!(t.read(a), b"x");
        assert_eq!(t.fs.getattr(a, None).unwrap().nlink, 2);
        // Renaming one name over the other of the same file does nothing.
        t.fs.link(a, root, os("m")).unwrap();
        t.fs.rename(root, os("l29"), root, os("m"), 0).unwrap();
        assert!(t.disk("l29").exists() && t.disk("m").exists());
        t.fs.unlink(root, os("l29")).unwrap();
        assert_eq!(t.read(a), b"x");
        t.verify();
        assert_eq!(errno(t.fs.link(t.root(), root, os("dirlink"))), c::EPERM);
        assert_eq!(errno(t.fs.link(a, root, os("m"))), c::EEXIST);
    }
}

#[test]
fn a_file_whose_known_names_are_gone_does_not_hold_its_handle_for_ever() {
    let t = tree(3);
    let root = t.root();
    for n in 0..20 {
        // Another name, of which nobody has told us.
        let name = format!("n{n}");
        let a = t.make(root, &name, b"x");
        fs::hard_link(t.disk(&name), t.disk(&format!("other{n}"))).unwrap();
        t.fs.unlink(root, os(&name)).unwrap();
        assert_eq!(t.read(a), b"x");
    }
    t.verify();
    assert_eq!(t.fs.nodes.idle(), 3);
    // Found again by the other name, it is as good as new.
    let a = node(&t, "other0");
    assert_eq!(t.read(a), b"x");
}

#[test]
fn few_handles_serve_many_nodes() {
    let t = tree(8);
    let root = t.root();
    let mut nodes = Vec::new();
    for n in 0..20 {
        let dir = t.mkdir(root, &format!("d{n}"));
        for m in 0..20 {
            let content = format!("{n}/{m}");
            nodes.push((t.make(dir, &content.replace('/', "-"), content.as_bytes()), content));
        }
    }
    assert_eq!(t.fs.nodes.idle(), 8);
    // Those and the root, of all that this process has open now.
    let open_now = fs::read_dir("/proc/self/fd").unwrap();
    let open_now = open_now.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    assert_eq!(open_now.filter(|path| path.starts_with(t.dir.path())).count(), 9);
    for (node, content) in nodes.iter().rev() {
        assert_eq!(t.read(*node), content.as_bytes());
    }
    t.verify();
    // What is open is not counted, nor closed.
    let open: Vec<u64> =
        nodes.iter().map(|(node, _)| t.fs.open(*node, c::O_RDONLY).unwrap()).collect();
    assert!(t.fs.nodes.idle() <= 8);
    for (handle, (_, content)) in open.iter().zip(&nodes) {
        assert_eq!(t.read_handle(*handle), content.as_bytes());
        t.fs.release(*handle).unwrap();
    }
    assert_eq!(t.fs.nodes.idle(), 8);
    t.verify();
}

#[test]
fn deep_trees_are_walked_again() {
    for limit in [0, 5] {
        let t = tree(limit);
        let name = "directory".repeat(20);
        let mut path = vec![t.root()];
        for _ in 0..500 {
            path.push(t.mkdir(path[path.len() - 1], &name));
        }
        let file = t.make(path[500], "file", b"deep");
        assert_eq!(t.read(file), b"deep");
        assert_eq!(t.fs.getattr(path[250], None).unwrap().ino, path[250]);
        assert_eq!(t.read(file), b"deep");
        // Forgotten from above, each still holds those over it.
        for node in &path[1..] {
            t.fs.forget(*node, 1);
        }
        assert_eq!(t.fs.nodes.count(), 502);
        assert_eq!(t.read(file), b"deep");
        t.verify();
        t.fs.forget(file, 1);
        assert_eq!(t.fs.nodes.count(), 1);
        assert_eq!(t.fs.nodes.idle(), 0);
        t.verify();
        // The temporary directory's own cleaning would need paths longer than there can be.
        empty_deep(&t.disk(""), &name);
    }
}

/// Removes the chain of directories `name` below `top`, moving each one up first.
fn empty_deep(top: &Path, name: &str) {
    let (level, next) = (top.join(name), top.join("next"));
    let _ = fs::remove_file(level.join("file"));
    while fs::rename(level.join(name), &next).is_ok() {
        fs::remove_dir(&level).unwrap();
        fs::rename(&next, &level).unwrap();
        let _ = fs::remove_file(level.join("file"));
    }
    fs::remove_dir(&level).unwrap();
}

#[test]
fn what_changed_behind_our_back_is_stale_and_never_somebody_else() {
    let t = tree(0);
    let root = t.root();
    let d = t.mkdir(root, "d");
    let a = t.make(d, "a", b"a");
    let b = t.make(root, "b", b"b");
    // Another file under the old name.
    fs::rename(t.disk("b"), t.disk("moved")).unwrap();
    fs::write(t.disk("b"), b"other").unwrap();
    assert_eq!(errno(t.fs.getattr(b, None)), c::ESTALE);
    assert_eq!(errno(t.fs.open(b, O_RDWR)), c::ESTALE);
    // A link where a directory was.
    fs::rename(t.disk("d"), t.disk("real")).unwrap();
    std::os::unix::fs::symlink(t.disk("real"), t.disk("d")).unwrap();
    assert_eq!(errno(t.fs.getattr(a, None)), c::ESTALE);
    assert_eq!(errno(t.fs.lookup(d, os("a"))), c::ESTALE);
    // Looking it up again mends it.
    assert_eq!(node(&t, "real"), d);
    assert_eq!(t.read(a), b"a");
    assert_eq!(node(&t, "moved"), b);
    assert_eq!(t.read(b), b"b");
    // A name of several.
    t.fs.link(b, root, os("second")).unwrap();
    fs::remove_file(t.disk("second")).unwrap();
    assert_eq!(t.read(b), b"b");
    fs::remove_file(t.disk("moved")).unwrap();
    assert_eq!(errno(t.fs.getattr(b, None)), c::ESTALE);
    assert_eq!(errno(t.fs.getattr(12_345_678_901, None)), c::ESTALE);
    t.verify();
}

#[test]
fn directories_moved_into_a_ring_are_stale() {
    let t = tree(0);
    let root = t.root();
    let a = t.mkdir(root, "a");
    let b = t.mkdir(a, "b");
    // As if two lookups had been overtaken by moves behind our back.
    let (fd, stat) = t.fs.nodes.find(&t.fs.nodes.get(root).unwrap(), os("a")).unwrap();
    t.fs.nodes.admit(b, os("a"), fd, &stat);
    assert_eq!(errno(t.fs.getattr(a, None)), c::ESTALE);
    assert_eq!(errno(t.fs.getattr(b, None)), c::ESTALE);
    assert_eq!(node(&t, "a"), a);
    assert_eq!(t.fs.getattr(b, None).unwrap().ino, b);
}

#[test]
fn symbolic_links_are_themselves() {
    let t = tree(0);
    let root = t.root();
    let target = "target/".repeat(580);
    let link = t.fs.symlink(&me(), root, os("link"), os(&target)).unwrap();
    assert_eq!(link.mode & c::S_IFMT, c::S_IFLNK);
    assert_eq!(t.fs.readlink(link.ino).unwrap(), os(&target));
    assert_eq!(errno(t.fs.readlink(root)), c::EINVAL);
    let time = Time { secs: -5, nanos: 999_999_999 };
    let change = SetAttr { mtime: Some(SetTime::At(time)), ..SetAttr::default() };
    assert_eq!(t.fs.setattr(link.ino, None, &change).unwrap().mtime, time);
    let change = SetAttr { size: Some(0), ..SetAttr::default() };
    assert_eq!(errno(t.fs.setattr(link.ino, None, &change)), c::EINVAL);
    let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    assert_eq!(errno(t.fs.setattr(link.ino, None, &change)), c::EOPNOTSUPP);
    let second = t.fs.link(link.ino, root, os("second")).unwrap();
    assert_eq!((second.ino, second.nlink), (link.ino, 2));
    t.fs.symlink(&me(), root, os("loop"), os("/")).unwrap();
    assert_eq!(errno(t.fs.lookup(node(&t, "loop"), os("etc"))), c::ENOTDIR);
    assert_eq!(errno(t.fs.opendir(node(&t, "loop"))), c::ENOTDIR);
    assert_eq!(errno(t.fs.symlink(&me(), root, os("e"), os(""))), c::ENOENT);
    t.verify();
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let t = tree(8);
    let root = t.root();
    for name in ["", ".", "..", "a/b", "../x", "nul\0"] {
        let name = os(name);
        assert_eq!(errno(t.fs.lookup(root, name)), c::EINVAL);
        assert_eq!(errno(t.fs.mkdir(&me(), root, name, 0o755)), c::EINVAL);
        assert_eq!(errno(t.fs.create(&me(), root, name, 0o644, O_RDWR)), c::EINVAL);
        assert_eq!(errno(t.fs.unlink(root, name)), c::EINVAL);
        assert_eq!(errno(t.fs.rename(root, name, root, os("x"), 0)), c::EINVAL);
        assert_eq!(errno(t.fs.link(root, root, name)), c::EINVAL);
    }
    // Any other bytes do.
    let odd = OsStr::from_bytes(b"\xff\n\\ ...");
    t.fs.mkdir(&me(), root, odd, 0o755).unwrap();
    assert!(t.disk("").join(odd).is_dir());
}

#[test]
fn another_file_system_is_not_entered() {
    let fs = Ingest::with_fd_limit(Path::new("/"), 8).unwrap();
    assert_eq!(errno(fs.lookup(fs.root(), os("proc"))), c::EXDEV);
    assert_eq!(errno(fs.rmdir(fs.root(), os("proc"))), c::EXDEV);
    assert_eq!(fs.nodes.count(), 1);
}

fn list(t: &Tree, handle: u64, offset: i64, room: usize) -> Vec<(String, i64)> {
    let mut names = Vec::new();
    t.fs.readdir(handle, offset, &mut |item| {
        if names.len() == room {
            return false;
        }
        names.push((item.name.to_str().unwrap().to_owned(), item.offset));
        true
    })
    .unwrap();
    names
}

#[test]
fn listings_resume_seek_and_rewind() {
    let t = tree(8);
    let d = t.mkdir(t.root(), "d");
    let mut expected = BTreeSet::from([".".to_owned(), "..".to_owned()]);
    for n in 0..5000 {
        let name = format!("name-{n}");
        fs::write(t.disk("d").join(&name), b"").unwrap();
        expected.insert(name);
    }
    let handle = t.fs.opendir(d).unwrap();
    let mut all = Vec::new();
    loop {
        let offset = all.last().map_or(0, |(_, offset)| *offset);
        let more = list(&t, handle, offset, 1 + all.len() % 100);
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    assert_eq!(all.len(), expected.len());
    assert_eq!(all.iter().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>(), expected);
    // From anywhere, in any order.
    for at in [4000, 17, 2500, 0, 4990] {
        let rest = list(&t, handle, all[at].1, 50);
        assert_eq!(rest, all[at + 1..(at + 51).min(all.len())]);
    }
    // No room at all moves nothing.
    assert_eq!(list(&t, handle, all[99].1, 0), []);
    assert_eq!(list(&t, handle, all[99].1, 1), all[100..101]);
    t.make(d, "fresh", b"");
    expected.insert("fresh".to_owned());
    for _ in 0..2 {
        let names = list(&t, handle, 0, usize::MAX);
        assert_eq!(names.into_iter().map(|it| it.0).collect::<BTreeSet<_>>(), expected);
    }
    assert_eq!(t.fs.fsyncdir(handle), Ok(()));
    t.fs.releasedir(handle).unwrap();
    assert_eq!(errno(t.fs.releasedir(handle)), c::EBADF);
    assert_eq!(errno(t.fs.fsyncdir(handle)), c::EBADF);
    assert_eq!(errno(t.fs.readdir(handle, 0, &mut |_| true)), c::EBADF);
    // Listing counts no references: the directory and the new file are all there is.
    assert_eq!(t.fs.nodes.count(), 3);
    t.verify();
}

#[test]
fn an_open_directory_that_was_removed_lists_nothing() {
    let t = tree(0);
    let d = t.mkdir(t.root(), "d");
    let handle = t.fs.opendir(d).unwrap();
    t.fs.rmdir(t.root(), os("d")).unwrap();
    assert_eq!(list(&t, handle, 0, 10), []);
    assert_eq!(t.fs.fsyncdir(handle), Ok(()));
    t.fs.forget(d, 1);
    assert_eq!(t.fs.nodes.count(), 2);
    t.fs.releasedir(handle).unwrap();
    assert_eq!(t.fs.nodes.count(), 1);
}

#[test]
fn errors_are_the_kernels() {
    let t = tree(8);
    let root = t.root();
    let d = t.mkdir(root, "d");
    let f = t.make(d, "f", b"");
    let long = "n".repeat(256);
    let cases = [
        (errno(t.fs.rmdir(root, os("d"))), c::ENOTEMPTY),
        (errno(t.fs.rmdir(d, os("f"))), c::ENOTDIR),
        (errno(t.fs.unlink(root, os("d"))), c::EISDIR),
        (errno(t.fs.unlink(root, os("none"))), c::ENOENT),
        (errno(t.fs.rmdir(root, os("none"))), c::ENOENT),
        (errno(t.fs.lookup(root, os("none"))), c::ENOENT),
        (errno(t.fs.lookup(f, os("x"))), c::ENOTDIR),
        (errno(t.fs.lookup(root, os(&long))), c::ENAMETOOLONG),
        (errno(t.fs.mkdir(&me(), root, os(&long), 0o755)), c::ENAMETOOLONG),
        (errno(t.fs.mkdir(&me(), root, os("d"), 0o755)), c::EEXIST),
        (errno(t.fs.mkdir(&me(), f, os("x"), 0o755)), c::ENOTDIR),
        (errno(t.fs.mknod(&me(), d, os("f"), c::S_IFREG | 0o644, 0)), c::EEXIST),
        (errno(t.fs.mknod(&me(), d, os("g"), c::S_IFDIR | 0o644, 0)), c::EPERM),
        (errno(t.fs.symlink(&me(), d, os("f"), os("x"))), c::EEXIST),
        (errno(t.fs.create(&me(), f, os("x"), 0o644, O_RDWR)), c::ENOTDIR),
        (errno(t.fs.rename(root, os("none"), root, os("x"), 0)), c::ENOENT),
        (errno(t.fs.rename(root, os("d"), d, os("f"), 0)), c::EINVAL),
        (errno(t.fs.rename(d, os("f"), root, os("d"), 0)), c::ENOTEMPTY),
        (errno(t.fs.rename(d, os("f"), root, os(&long), 0)), c::ENAMETOOLONG),
        (errno(t.fs.opendir(f)), c::ENOTDIR),
        (errno(t.fs.setattr(d, None, &SetAttr { size: Some(0), ..Default::default() })), c::EISDIR),
        (
            errno(t.fs.setattr(f, None, &SetAttr { size: Some(1 << 63), ..Default::default() })),
            c::EFBIG,
        ),
    ];
    for (at, (found, expected)) in cases.into_iter().enumerate() {
        assert_eq!(found, expected, "case {at}");
    }
    // Not the same in every order: over a directory, rename(2) wants one, too.
    t.mkdir(root, "e");
    assert_eq!(errno(t.fs.rename(d, os("f"), root, os("e"), 0)), c::EISDIR);
    assert_eq!(errno(t.fs.rename(root, os("e"), d, os("f"), 0)), c::ENOTDIR);
    assert!(t.fs.statfs().unwrap().total_bytes > 0);
    // Failures leave no object, reference or pin behind.
    for node in [d, f] {
        t.fs.forget(node, 1);
    }
    t.fs.forget(node(&t, "e"), 2);
    assert_eq!(t.fs.nodes.count(), 1);
    t.verify();
}

#[test]
fn extended_attributes_pass() {
    let t = tree(0);
    let root = t.root();
    let f = t.make(root, "f", b"");
    let d = t.mkdir(root, "d");
    let key = os("user.key");
    let (create, replace) = (1, 2);
    for node in [f, d] {
        assert_eq!(errno(t.fs.getxattr(node, key)), c::ENODATA);
        assert_eq!(errno(t.fs.setxattr(node, key, b"v", replace)), c::ENODATA);
        t.fs.setxattr(node, key, b"value", create).unwrap();
        assert_eq!(errno(t.fs.setxattr(node, key, b"v", create)), c::EEXIST);
        assert_eq!(t.fs.getxattr(node, key).unwrap(), b"value");
        t.fs.setxattr(node, key, b"", 0).unwrap();
        assert_eq!(t.fs.getxattr(node, key).unwrap(), b"");
        t.fs.setxattr(node, key, &[7; 2000], replace).unwrap();
        assert_eq!(t.fs.getxattr(node, key).unwrap(), [7; 2000]);
        assert!(t.fs.listxattr(node).unwrap().contains(&key.to_owned()));
        t.fs.removexattr(node, key).unwrap();
        assert_eq!(errno(t.fs.removexattr(node, key)), c::ENODATA);
        assert!(!t.fs.listxattr(node).unwrap().contains(&key.to_owned()));
    }
    // A link whose target exists: what is set must not land on that.
    let link = t.fs.symlink(&me(), root, os("link"), os("f")).unwrap().ino;
    assert_eq!(errno(t.fs.setxattr(link, key, b"v", 0)), c::EPERM);
    assert_eq!(errno(t.fs.getxattr(link, key)), c::ENODATA);
    let key = os("trusted.key");
    let set = t.fs.setxattr(link, key, b"v", 0);
    if sys::effective_uid() == 0 {
        set.unwrap();
        assert_eq!(t.fs.getxattr(link, key).unwrap(), b"v");
        assert!(t.fs.listxattr(link).unwrap().contains(&key.to_owned()));
        t.fs.removexattr(link, key).unwrap();
    } else {
        assert_eq!(errno(set), c::EPERM);
    }
    assert_eq!(errno(t.fs.getxattr(f, key)), c::ENODATA);
}

#[test]
fn holes_are_found_and_made() {
    let t = tree(8);
    let (_, handle) = t.fs.create(&me(), t.root(), os("f"), 0o644, O_RDWR).unwrap();
    let chunk = 1 << 20;
    t.fs.write(handle, 2 * chunk, &vec![1; 1 << 20]).unwrap();
    assert_eq!(t.fs.seek(handle, 0, c::SEEK_DATA), Ok(2 * chunk));
    assert_eq!(t.fs.seek(handle, 0, c::SEEK_HOLE), Ok(0));
    assert_eq!(t.fs.seek(handle, 2 * chunk, c::SEEK_HOLE), Ok(3 * chunk));
    assert_eq!(errno(t.fs.seek(handle, 3 * chunk, c::SEEK_DATA)), c::ENXIO);
    assert_eq!(errno(t.fs.seek(handle, 0, 0)), c::EINVAL);
    t.fs.fallocate(handle, 0, 0, 4 * chunk).unwrap();
    assert_eq!(t.fs.getattr(0, Some(handle)).unwrap().size, 4 * chunk);
    let punch_and_keep_size = 3;
    t.fs.fallocate(handle, punch_and_keep_size, 2 * chunk, chunk).unwrap();
    let mut buf = [1; 16];
    assert_eq!(t.fs.read(handle, 2 * chunk, &mut buf), Ok(16));
    assert_eq!(buf, [0; 16]);
    assert_eq!(errno(t.fs.fallocate(handle, 0, 0, 0)), c::EINVAL);
}

#[test]
fn ranges_are_copied_in_the_kernel() {
    let t = tree(8);
    let root = t.root();
    let from = t.make(root, "from", b"0123456789");
    let to = t.make(root, "to", b"abcdefghij");
    let (source, dest) = (t.fs.open(from, c::O_RDONLY).unwrap(), t.fs.open(to, O_RDWR).unwrap());
    assert_eq!(t.fs.copy_file_range(source, 2, dest, 8, 5), Ok(5));
    assert_eq!(t.read(to), b"abcdefgh23456");
    assert_eq!(t.fs.copy_file_range(source, 10, dest, 0, 5), Ok(0));
    assert_eq!(errno(t.fs.copy_file_range(dest, 0, source, 0, 5)), c::EBADF);
    assert_eq!(errno(t.fs.copy_file_range(source, 0, 999, 0, 5)), c::EBADF);
}

#[test]
fn attributes_are_set_in_an_order_that_lasts() {
    let t = tree(0);
    let f = t.make(t.root(), "f", b"12345");
    let (then, later) = (Time { secs: 5, nanos: 1 }, Time { secs: 9_000_000_000, nanos: 0 });
    let own = me();
    let change = SetAttr {
        mode: Some(c::S_IFREG | 0o4711),
        uid: Some(own.uid),
        gid: Some(own.gid),
        size: Some(2),
        atime: Some(SetTime::At(then)),
        mtime: Some(SetTime::At(later)),
    };
    let stat = t.fs.setattr(f, None, &change).unwrap();
    assert_eq!((stat.size, stat.mode & 0o7777), (2, 0o4711));
    assert_eq!((stat.atime, stat.mtime), (then, later));
    let change = SetAttr { mtime: Some(SetTime::Now), ..SetAttr::default() };
    let stat = t.fs.setattr(f, None, &change).unwrap();
    assert_eq!(stat.atime, then);
    assert_eq!(stat.mtime, stat.ctime);
    // Nothing asked, nothing done.
    assert_eq!(t.fs.setattr(f, None, &SetAttr::default()), Ok(stat));
    // A handle that is open for reading does not stand in the way of a new size.
    let handle = t.fs.open(f, c::O_RDONLY).unwrap();
    let change = SetAttr { size: Some(0), ..SetAttr::default() };
    assert_eq!(t.fs.setattr(f, Some(handle), &change).unwrap().size, 0);
}

#[test]
fn new_objects_belong_to_the_caller_where_that_is_possible() {
    let t = tree(8);
    let root = t.root();
    let own = me();
    let caller = Caller { uid: 1234, gid: 2345, umask: 0o027 };
    // Without root's power everything is this process's own.
    let superuser = own.uid == 0;
    let owner = if superuser { (1234, 2345) } else { (own.uid, own.gid) };
    let owned = |stat: Stat, mode: u32| {
        assert_eq!((stat.uid, stat.gid), owner);
        assert_eq!(stat.mode & 0o7777, mode);
    };
    // The root is closed to the caller: whether to let it in was the kernel's decision.
    owned(t.fs.mkdir(&caller, root, os("d"), 0o777).unwrap(), 0o750);
    owned(t.fs.mknod(&caller, root, os("n"), c::S_IFREG | 0o664, 0).unwrap(), 0o640);
    owned(t.fs.mknod(&caller, root, os("p"), c::S_IFIFO | 0o664, 0).unwrap(), 0o640);
    owned(t.fs.mknod(&caller, root, os("s"), c::S_IFSOCK | 0o664, 0).unwrap(), 0o640);
    owned(t.fs.symlink(&caller, root, os("l"), os("x")).unwrap(), 0o777);
    let (stat, handle) = t.fs.create(&caller, root, os("f"), 0o444, O_RDWR).unwrap();
    owned(stat, 0o440);
    assert_eq!(t.fs.write(handle, 0, b"x"), Ok(1));
    assert_eq!(errno(t.fs.mkdir(&caller, root, os("d"), 0o777)), c::EEXIST);
    // And then this thread is itself again.
    let stat = t.fs.mkdir(&own, root, os("mine"), 0o777).unwrap();
    assert_eq!((stat.uid, stat.gid), (own.uid, own.gid));
    if superuser {
        let device = sys::device_number(1, 3);
        let stat = t.fs.mknod(&own, root, os("null"), c::S_IFCHR | 0o600, device).unwrap();
        assert_eq!(stat.rdev, device);
        let group = Caller { uid: 0, gid: 77, umask: 0 };
        let stat = t.fs.mkdir(&group, root, os("group"), 0o700).unwrap();
        assert_eq!((stat.uid, stat.gid), (0, 77));
    }
}

#[test]
fn a_directory_hands_down_its_group_and_its_access_list() {
    let t = tree(8);
    let root = t.root();
    let superuser = sys::effective_uid() == 0;
    let caller = Caller { uid: 1234, gid: 2345, umask: 0o077 };
    let d = t.mkdir(root, "d");
    let gid = if superuser { 4444 } else { sys::effective_gid() };
    let change = SetAttr { gid: Some(gid), mode: Some(0o2755), ..SetAttr::default() };
    t.fs.setattr(d, None, &change).unwrap();
    let sub = t.fs.mkdir(&caller, d, os("sub"), 0o777).unwrap();
    assert_eq!((sub.gid, sub.mode & 0o7777), (gid, 0o2700));
    let (file, _) = t.fs.create(&caller, d, os("file"), 0o666, O_RDWR).unwrap();
    assert_eq!((file.gid, file.mode & 0o7777), (gid, 0o600));
    if superuser {
        assert_eq!((sub.uid, file.uid), (1234, 1234));
        // Nobody gets a program of a group that is not theirs.
        let (caller, mode) = (Caller { umask: 0o022, ..caller }, c::S_IFREG | 0o2755);
        let program = t.fs.mknod(&caller, d, os("program"), mode, 0).unwrap();
        assert_eq!(program.mode & 0o7777, 0o755);
    }
    // user::rwx, user:1234:rwx, group::r-x, mask::rwx, other::r--
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1, 7, u32::MAX), (2, 7, 1234), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 4, u32::MAX)]
    {
        acl.extend(u16::to_le_bytes(tag));
        acl.extend(u16::to_le_bytes(perm));
        acl.extend(u32::to_le_bytes(id));
    }
    let e = t.mkdir(root, "e");
    t.fs.setxattr(e, os(DEFAULT_ACL), &acl, 0).unwrap();
    let stat = t.fs.mkdir(&caller, e, os("sub"), 0o777).unwrap();
    assert_eq!(stat.mode & 0o7777, 0o774);
    assert_eq!(t.fs.getxattr(stat.ino, os(DEFAULT_ACL)).unwrap(), acl);
    let (stat, _) = t.fs.create(&caller, e, os("file"), 0o660, O_RDWR).unwrap();
    assert_eq!(stat.mode & 0o7777, 0o660);
    assert!(t.fs.getxattr(stat.ino, os("system.posix_acl_access")).is_ok());
}

#[test]
fn an_owner_that_cannot_be_leaves_no_object() {
    let t = tree(8);
    let root = t.root();
    // The number that means "no user"; only root would try to use it.
    let nobody = Caller { uid: u32::MAX, gid: 5, umask: 0 };
    if sys::effective_uid() == 0 {
        assert_eq!(errno(t.fs.mkdir(&nobody, root, os("d"), 0o755)), c::EPERM);
        assert_eq!(errno(t.fs.create(&nobody, root, os("f"), 0o644, O_RDWR)), c::EPERM);
        assert_eq!(fs::read_dir(t.disk("")).unwrap().count(), 0);
        assert_eq!(t.fs.nodes.count(), 1);
        let stat = t.fs.mkdir(&me(), root, os("d"), 0o755).unwrap();
        assert_eq!((stat.uid, stat.gid), (0, sys::effective_gid()));
    } else {
        t.fs.mkdir(&nobody, root, os("d"), 0o755).unwrap();
    }
}

#[test]
fn a_file_that_appeared_meanwhile_is_opened_only_with_permission() {
    let t = tree(8);
    if sys::effective_uid() != 0 {
        // One user: what the daemon may open, its only caller may.
        fs::OpenOptions::new().create_new(true).write(true).mode(0o000).open(t.disk("f")).unwrap();
        assert_eq!(errno(t.fs.create(&me(), t.root(), os("f"), 0o644, O_RDWR)), c::EACCES);
        return;
    }
    let caller = Caller { uid: 1234, gid: 2345, umask: 0o022 };
    let create = |flags| t.fs.create(&caller, t.root(), os("f"), 0o644, flags);
    fs::write(t.disk("f"), b"secret").unwrap();
    fs::set_permissions(t.disk("f"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(t.disk(""), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(errno(create(c::O_RDONLY)), c::EACCES);
    assert_eq!(errno(create(O_RDWR | c::O_TRUNC)), c::EACCES);
    assert_eq!(t.fs.nodes.count(), 1);
    assert_eq!(fs::read(t.disk("f")).unwrap(), b"secret");
    fs::set_permissions(t.disk("f"), fs::Permissions::from_mode(0o644)).unwrap();
    let (_, handle) = create(c::O_RDONLY).unwrap();
    assert_eq!(t.read_handle(handle), b"secret");
}

#[test]
fn who_closes_a_file_is_told_of_what_was_lost() {
    let t = tree(8);
    let node = t.make(t.root(), "f", b"x");
    let (reader, writer) = (t.fs.open(node, c::O_RDONLY), t.fs.open(node, O_RDWR));
    let (reader, writer) = (reader.unwrap(), writer.unwrap());
    t.fs.lost(node, Errno(c::ENOSPC));
    assert_eq!(t.fs.flush(reader), Ok(()));
    assert_eq!(errno(t.fs.flush(writer)), c::ENOSPC);
    assert_eq!(t.fs.flush(writer), Ok(()));
}

#[test]
fn forgetting_frees() {
    let t = tree(1000);
    let root = t.root();
    let d = t.mkdir(root, "d");
    let files: Vec<u64> = (0..100).map(|n| t.make(d, &format!("f{n}"), b"")).collect();
    assert_eq!(t.fs.nodes.count(), 102);
    for _ in 0..3 {
        t.fs.lookup(d, os("f0")).unwrap();
    }
    t.fs.forget(d, 1);
    assert_eq!(t.fs.nodes.count(), 102);
    for file in &files {
        t.fs.forget(*file, 1);
    }
    // One file is still known, and holds its directory.
    assert_eq!(t.fs.nodes.count(), 3);
    t.fs.forget(files[0], 2);
    assert_eq!(t.fs.nodes.count(), 3);
    let handle = t.fs.open(files[0], c::O_RDONLY).unwrap();
    t.fs.forget(files[0], 1);
    assert_eq!(t.fs.nodes.count(), 3);
    t.verify();
    t.fs.release(handle).unwrap();
    assert_eq!(t.fs.nodes.count(), 1);
    t.fs.forget(root, 5);
    t.fs.forget(files[0], 5);
    assert_eq!(t.fs.getattr(root, None).unwrap().ino, root);
    assert_eq!(t.fs.nodes.idle(), 0);
    t.verify();
}

#[test]
fn renames_at_the_same_time_do_not_lose_a_node() {
    let t = tree(0);
    let root = t.root();
    let a = t.mkdir(root, "a");
    let b = t.mkdir(a, "b");
    let f = t.make(b, "f", b"x");
    let done = AtomicBool::new(false);
    let running = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..3000 {
                let (from, to) = if n % 2 == 0 { ("a", "z") } else { ("z", "a") };
                t.fs.rename(root, os(from), root, os(to), 0).unwrap();
                if n % 3 == 0 {
                    t.fs.link(f, b, os("second")).unwrap();
                    t.fs.unlink(b, os("second")).unwrap();
                    t.fs.forget(f, 1);
                }
            }
            done.store(true, running);
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(running) {
                    assert_eq!(t.fs.getattr(f, None).unwrap().ino, f);
                    assert_eq!(t.fs.lookup(b, os("f")).unwrap().ino, f);
                    t.fs.forget(f, 1);
                }
            });
        }
    });
    t.verify();
    for node in [f, b, a] {
        t.fs.forget(node, 1);
    }
    assert_eq!(t.fs.nodes.count(), 1);
}

/// Small, fast and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// Does the same to the tree and, directly, to a second directory.
struct Model {
    t: Tree,
    mirror: OwnedFd,
    random: Random,
    /// Nodes that the kernel would hold, what they are in the mirror, and an open handle.
    held: Vec<(u64, OwnedFd, Option<u64>)>,
    stale: usize,
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

impl Model {
    fn new(seed: u64, limit: usize) -> Model {
        let t = tree(limit);
        let path = t.dir.path().join("mirror");
        DirBuilder::new().mode(0o700).create(&path).unwrap();
        let mirror = sys::open_dir(&path).unwrap();
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Model { t, mirror, random, held: Vec::new(), stale: 0 }
    }

    fn name(&mut self) -> &'static OsStr {
        os(NAMES[self.random.below(NAMES.len())])
    }

    /// Some directory of both, a reference to which is held; the error if what is there is none.
    fn walk(&mut self) -> Option<(u64, OwnedFd)> {
        let fs = &self.t.fs;
        let mut node = fs.root();
        let mut mirror = at::open_dir(&self.mirror, os(".")).unwrap();
        for _ in 0..self.random.below(4) {
            let name = os(NAMES[self.random.below(NAMES.len())]);
            let (found, there) = (fs.lookup(node, name), at::open_path(&mirror, name));
            fs.forget(if node == fs.root() { 0 } else { node }, 1);
            match (found, there) {
                (Ok(stat), Ok(there)) => (node, mirror) = (stat.ino, there),
                (Err(e), Err(there)) => {
                    assert_eq!(e, Errno::from(there));
                    return None;
                }
                other => panic!("{other:?}"),
            }
        }
        Some((node, mirror))
    }

    /// Compares two answers; a reference that came with one is held or undone.
    fn node(&mut self, found: FsResult<Stat>, done: io::Result<()>, dir: &OwnedFd, name: &OsStr) {
        match (found, done.map_err(Errno::from)) {
            (Ok(stat), Ok(())) => {
                let there = at::open_path(dir, name).unwrap();
                same(&stat, &sys::fstat(&there).unwrap());
                if self.random.below(2) == 0 {
                    self.held.push((stat.ino, there, None));
                } else {
                    self.t.fs.forget(stat.ino, 1);
                }
            }
            (found, done) => assert_eq!(found.map(|_| ()), done),
        }
    }

    fn step(&mut self) {
        let Some((dir, mirror)) = self.walk() else { return };
        let name = self.name();
        match self.random.below(15) {
            0..3 => {
                let made = self.t.fs.mkdir(&me(), dir, name, 0o755);
                self.node(made, at::mkdir(&mirror, name, 0o755), &mirror, name);
            }
            3 => {
                let made = self.t.fs.symlink(&me(), dir, name, os("target"));
                self.node(made, at::symlink(os("target"), &mirror, name), &mirror, name);
            }
            4 => {
                let mode = c::S_IFIFO | 0o600;
                let made = self.t.fs.mknod(&me(), dir, name, mode, 0);
                self.node(made, at::mknod(&mirror, name, mode, 0), &mirror, name);
            }
            5..7 => self.create(dir, &mirror, name),
            7 => {
                let done = at::unlink(&mirror, name).map_err(Errno::from);
                assert_eq!(self.t.fs.unlink(dir, name), done);
            }
            8 => {
                let done = at::rmdir(&mirror, name).map_err(Errno::from);
                assert_eq!(self.t.fs.rmdir(dir, name), done);
            }
            9..12 => self.rename(dir, &mirror, name),
            12 => {
                let found = self.t.fs.lookup(dir, name);
                self.node(found, at::stat(&mirror, name).map(drop), &mirror, name);
            }
            _ => self.link(dir, &mirror, name),
        }
        self.t.fs.forget(if dir == self.t.root() { 0 } else { dir }, 1);
        self.touch_held();
    }

    fn create(&mut self, dir: u64, mirror: &OwnedFd, name: &OsStr) {
        let flags = O_RDWR | c::O_EXCL;
        let made = self.t.fs.create(&me(), dir, name, 0o644, flags);
        let there = at::open_flags(mirror, name, flags | c::O_CREAT, 0o644);
        match (made, there) {
            (Ok((stat, handle)), Ok(there)) => {
                let data = vec![b'x'; self.random.below(100)];
                self.t.fs.write(handle, 3, &data).unwrap();
                File::from(there).write_all_at(&data, 3).unwrap();
                self.t.fs.release(handle).unwrap();
                let stat = self.t.fs.getattr(stat.ino, None);
                self.node(stat, Ok(()), mirror, name);
            }
            (made, there) => assert_eq!(made.map(drop), there.map(drop).map_err(Errno::from)),
        }
    }

    fn rename(&mut self, dir: u64, mirror: &OwnedFd, name: &OsStr) {
        let Some((new_dir, new_mirror)) = self.walk() else { return };
        let new_name = self.name();
        let flags = [0, 0, c::RENAME_EXCHANGE, c::RENAME_NOREPLACE][self.random.below(4)];
        // Of several things that are wrong, a parent that is none comes first, but the kernel never
        // lets that come to us.
        if sys::fstat(&new_mirror).unwrap().is_dir() {
            assert_eq!(
                self.t.fs.rename(dir, name, new_dir, new_name, flags),
                at::rename(mirror, name, &new_mirror, new_name, flags).map_err(Errno::from)
            );
        }
        self.t.fs.forget(if new_dir == self.t.root() { 0 } else { new_dir }, 1);
    }

    fn link(&mut self, dir: u64, mirror: &OwnedFd, name: &OsStr) {
        if self.held.is_empty() {
            return;
        }
        let (node, there, _) = &self.held[self.random.below(self.held.len())];
        let (made, done) = (self.t.fs.link(*node, dir, name), at::link_fd(there, mirror, name));
        if made == Err(Errno(c::ESTALE)) {
            // Undone: what the tree does not know any more, it cannot link.
            if done.is_ok() {
                at::unlink(mirror, name).unwrap();
            }
            self.stale += 1;
            return;
        }
        self.node(made, done, mirror, name);
    }

    /// Uses, opens, closes or lets go of something that is held, under whatever name it is now.
    fn touch_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let at = self.random.below(self.held.len());
        let what = self.random.below(6);
        let (node, there, handle) = &mut self.held[at];
        let expected = sys::fstat(&*there).unwrap();
        match self.t.fs.getattr(*node, None) {
            Ok(stat) => same(&stat, &expected),
            // Its only names that are left are some that the tree was never told of.
            Err(e) => {
                assert_eq!(e, Errno(c::ESTALE));
                assert!(expected.nlink > 0 && !expected.is_dir() && handle.is_none());
                self.stale += 1;
                return;
            }
        }
        match (what, *handle) {
            (0..2, None) if expected.is_file() => {
                *handle = Some(self.t.fs.open(*node, O_RDWR).unwrap());
            }
            (_, Some(open)) => {
                self.t.fs.write(open, 50, b"more").unwrap();
                let file = File::from(at::reopen(&*there, O_RDWR).unwrap());
                file.write_all_at(b"more", 50).unwrap();
                if what < 3 {
                    self.t.fs.release(open).unwrap();
                    *handle = None;
                }
            }
            (5, None) => {
                self.t.fs.forget(*node, 1);
                self.held.swap_remove(at);
            }
            _ => {}
        }
    }
}

fn same(found: &Stat, expected: &Stat) {
    let facts = |it: &Stat| {
        let size = if it.is_dir() { 0 } else { it.size };
        (it.mode, it.nlink, it.uid, it.gid, size)
    };
    assert_eq!(facts(found), facts(expected));
}

/// All that is below a directory: paths, what they are, and the groups of names of one file.
fn everything(top: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![top.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(top).unwrap().display();
        let size = if meta.is_dir() { 0 } else { meta.size() };
        let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        found.push(format!("{name} {:o} {} {size} {content:?}", meta.mode(), meta.nlink()));
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found.sort();
    found
}

#[test]
fn random_operations_match_the_kernels_own() {
    let mut stale = 0;
    for seed in 1..=60 {
        // Without any idle handle, with few, and with more than there are nodes.
        let limit = [0, 3, 10_000][usize::try_from(seed % 3).unwrap()];
        let mut model = Model::new(seed, limit);
        for step in 0..400 {
            model.step();
            if step % 50 == 0 {
                model.t.verify();
            }
        }
        assert_eq!(everything(&model.t.disk("")), everything(&model.t.dir.path().join("mirror")));
        assert!(limit < 100 || model.stale == 0);
        stale += model.stale;
        for (node, _, handle) in model.held.drain(..) {
            if let Some(handle) = handle {
                model.t.fs.release(handle).unwrap();
            }
            model.t.fs.forget(node, 1);
        }
        model.t.verify();
        assert_eq!(model.t.fs.nodes.count(), 1, "seed {seed}");
    }
    // Files that are known by none of their names are rare, or names are being lost.
    assert!(stale < 10, "{stale}");
}
