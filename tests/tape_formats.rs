//! Archives, between us and GNU cpio, bsdcpio and afio.
//!
//! Invariant: what one writes the others read, member by member; where a program cannot, the test
//! says which and what it does instead.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use raidtape::sys;
use raidtape::sys::c;
use raidtape::tape::cpio::{Added, Archive, Format, Header, Note, Reader};
use tempfile::TempDir;

use crate::common::{need_root, need_tool, path_of};

/// What is compared of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    mtime: i64,
    rdev: u64,
    content: Vec<u8>,
    links: u64,
}

type Tree = BTreeMap<Vec<u8>, Facts>;

/// A program that reads and writes archives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    Gnu,
    Bsd,
    Afio,
}

impl Tool {
    const ALL: [Tool; 3] = [Tool::Gnu, Tool::Bsd, Tool::Afio];

    /// Runs the program in `dir`; gives what it prints.
    fn run(self, dir: &Path, args: &[&str], input: impl Into<Stdio>) -> Vec<u8> {
        let name = match self {
            Tool::Gnu => "cpio",
            Tool::Bsd => "bsdcpio",
            Tool::Afio => "afio",
        };
        need_tool(name);
        let mut command = Command::new(name);
        command.current_dir(dir).args(args).stdin(input).env("LC_ALL", "C");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name} {args:?}: {}\n{said}", output.status);
        output.stdout
    }

    fn extract(self, archive: &Path, dir: &Path) {
        fs::create_dir(dir).unwrap();
        let input = File::open(archive).unwrap();
        match self {
            Tool::Gnu => self.run(dir, &["-idmu", "--quiet"], input),
            Tool::Bsd => self.run(dir, &["-idmu", "--quiet"], input),
            Tool::Afio => self.run(dir, &["-i", archive.to_str().unwrap()], Stdio::null()),
        };
    }

    fn list(self, archive: &Path) -> Vec<Vec<u8>> {
        let input = File::open(archive).unwrap();
        let printed = match self {
            Tool::Afio => self.run(Path::new("/"), &["-t", archive.to_str().unwrap()], input),
            Tool::Bsd => self.run(Path::new("/"), &["-it", "--quiet"], input),
            Tool::Gnu => self.run(Path::new("/"), &["-it", "--quiet", "-C", "1048576"], input),
        };
        let lines = printed.split(|it| *it == b'\n').filter(|it| !it.is_empty());
        lines.map(<[u8]>::to_vec).collect()
    }

    fn write(self, dir: &Path, names: &[Vec<u8>], format: &str, archive: &Path) {
        let list = dir.with_extension("list");
        // afio passes over a last line without its newline.
        fs::write(&list, [&names.join(&b'\n')[..], b"\n"].concat()).unwrap();
        let input = File::open(&list).unwrap();
        let path = archive.to_str().unwrap();
        match self {
            Tool::Afio => {
                self.run(dir, &["-o", format, path], input);
            }
            _ => {
                let printed = self.run(dir, &["-o", "--quiet", "-H", format], input);
                fs::write(archive, printed).unwrap();
            }
        }
    }
}

fn facts(path: &Path) -> Facts {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let kind = meta.file_type();
    let content = match kind {
        it if it.is_file() => fs::read(path).unwrap(),
        it if it.is_symlink() => fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec(),
        _ => Vec::new(),
    };
    let is_device = kind.is_char_device() || kind.is_block_device();
    Facts {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        // Nobody sets those of links, and directories are changed by what is put into them.
        mtime: if kind.is_dir() || kind.is_symlink() { 0 } else { meta.mtime() },
        rdev: if is_device { meta.rdev() } else { 0 },
        content,
        links: if kind.is_dir() { 0 } else { meta.nlink() },
    }
}

fn tree(dir: &Path, names: &[Vec<u8>]) -> Tree {
    names.iter().map(|it| (it.clone(), facts(&dir.join(path_of(it))))).collect()
}

fn shell(dir: &Path, script: &str) {
    let status = Command::new("bash").arg("-euc").arg(script).current_dir(dir).status().unwrap();
    assert!(status.success(), "{script}");
}

/// A tree with one of everything that each program can say; its names in order.
fn plain_tree(dir: &Path) -> Vec<Vec<u8>> {
    need_root("it makes device nodes");
    fs::create_dir(dir).unwrap();
    shell(
        dir,
        "umask 022; printf hello >a; ln a b; ln a c; chmod 6755 a; touch -d @1 a; : >empty
         ln -s a link; ln -s \"$(printf 'x%.0s' {1..200})\" far; mkfifo fifo; mknod null c 1 3
         mknod zero c 0 0; mknod disk b 7 255; mkdir d; chmod 1777 d
         head -c 100000 /dev/urandom >d/big
         chown 65534:12345 d/big
         touch -d @2147483647 d/big",
    );
    let mut names: Vec<Vec<u8>> =
        ["a", "b", "c", "empty", "link", "far", "fifo", "null", "zero", "disk", "d", "d/big"]
            .map(|it| it.as_bytes().to_vec())
            .into();
    for name in [&b"odd \xff\xfe\x01\t name"[..], b"-o", b"TRAILER!!!!", &[b'n'; 255]] {
        fs::write(dir.join(path_of(name)), name).unwrap();
        names.push(name.to_vec());
    }
    names
}

/// Writes an archive of these files; gives what became of each.
fn write(dir: &Path, names: &[Vec<u8>], archive: &Path) -> Vec<Added> {
    let root: OwnedFd = sys::open_dir(dir).unwrap();
    let mut out = Archive::new(io::BufWriter::new(File::create(archive).unwrap()));
    let added = names.iter().map(|it| out.add_file(&root, it).unwrap()).collect();
    out.finish(32_768).unwrap();
    assert_eq!(fs::metadata(archive).unwrap().len() % 32_768, 0);
    added
}

/// What our reader finds in an archive, as facts; links are those of one (dev, ino).
fn read(archive: &Path) -> Tree {
    let mut reader = Reader::new(io::BufReader::new(File::open(archive).unwrap()));
    let (mut found, mut ids) = (Tree::new(), BTreeMap::new());
    let mut order = Vec::new();
    while let Some(member) = reader.next_member().unwrap() {
        let content = reader.read_all(1 << 20).unwrap();
        let it = &member.header;
        let kind = it.mode & c::S_IFMT;
        let timeless = kind == c::S_IFDIR || kind == c::S_IFLNK;
        let id = (kind != c::S_IFDIR && it.nlink > 1).then_some((it.dev, it.ino));
        if let Some(id) = id {
            *ids.entry(id).or_insert(0) += 1;
        }
        order.push((member.name.clone(), id));
        let facts = Facts {
            mode: it.mode,
            owner: (it.uid, it.gid),
            mtime: if timeless { 0 } else { it.mtime },
            rdev: if it.is_device() { it.device() } else { 0 },
            content,
            links: u64::from(kind != c::S_IFDIR),
        };
        assert!(found.insert(member.name, facts).is_none());
    }
    // The content of linked files may go with only one of their names.
    for (name, id) in &order {
        let Some(id) = id else { continue };
        let others = order.iter().filter(|it| it.1 == Some(*id));
        let content = others.map(|it| found[&it.0].content.clone()).max_by_key(Vec::len).unwrap();
        let facts = found.get_mut(name).unwrap();
        facts.content = content;
        facts.links = ids[id];
    }
    found
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::Builder::new().prefix("raidtape-test-").tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

#[test]
fn every_program_reads_what_we_write() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    let names = plain_tree(&source);
    let added = write(&source, &names, &archive);
    for (name, added) in names.iter().zip(&added) {
        assert!(matches!(added, Added::Whole { notes, .. } if notes.is_empty()), "{name:?}");
    }
    let expected = tree(&source, &names);
    assert_eq!(read(&archive), expected);
    for tool in Tool::ALL {
        let dir = base.join(format!("{tool:?}"));
        tool.extract(&archive, &dir);
        for (name, mut facts) in tree(&dir, &names) {
            if tool == Tool::Afio {
                // What has content of its own is a file of its own for it.
                facts.links = expected[&name].links;
            }
            assert_eq!(facts, expected[&name], "{tool:?}: {:?}", String::from_utf8_lossy(&name));
        }
    }
}

#[test]
fn every_position_is_that_of_its_member() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    let names = plain_tree(&source);
    for (name, added) in names.iter().zip(write(&source, &names, &archive)) {
        let Added::Whole { position, .. } = added else { panic!("{name:?}") };
        let mut file = File::open(&archive).unwrap();
        file.seek(SeekFrom::Start(position)).unwrap();
        let mut reader = Reader::at(file, position);
        let member = reader.next_member().unwrap().unwrap();
        assert_eq!((&member.name, member.position), (name, position));
        let content = reader.read_all(1 << 20).unwrap();
        assert_eq!(content, facts(&source.join(path_of(name))).content);
    }
}

#[test]
fn we_read_what_every_program_writes() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    let names = plain_tree(&source);
    let expected = tree(&source, &names);
    let cases: &[(Tool, &str, Format)] = &[
        (Tool::Gnu, "odc", Format::Odc),
        (Tool::Gnu, "newc", Format::Newc),
        (Tool::Gnu, "crc", Format::NewcSummed),
        (Tool::Gnu, "bin", Format::Binary { is_big_endian: false }),
        (Tool::Bsd, "odc", Format::Odc),
        (Tool::Bsd, "newc", Format::Newc),
        (Tool::Bsd, "bin", Format::Binary { is_big_endian: false }),
        (Tool::Afio, "-v", Format::Odc),
        (Tool::Afio, "-4", Format::Extended),
    ];
    for (tool, format, expected_format) in cases {
        let mut names = names.clone();
        if (*tool, *format) == (Tool::Bsd, "bin") {
            // It refuses them in this format.
            names.retain(|it| it != b"fifo");
        }
        tool.write(&source, &names, format, &archive);
        let mut found = read(&archive);
        for (name, facts) in &mut found {
            let expected = expected[name].clone();
            if matches!(expected_format, Format::Binary { .. }) {
                // 16 bits: the number of a device of 0 is afio's way for one that is longer.
                facts.rdev = expected.rdev;
            }
            if *name == b"zero" && *tool != Tool::Afio {
                // They give a device 0:0 an inode number, which afio takes for the device's.
                facts.rdev = expected.rdev;
            }
            assert_eq!(*facts, expected, "{tool:?} {format}: {:?}", String::from_utf8_lossy(name));
        }
        assert_eq!(found.len(), names.len(), "{tool:?} {format}");
        let mut reader = Reader::new(File::open(&archive).unwrap());
        assert_eq!(reader.next_member().unwrap().unwrap().format, *expected_format);
        fs::remove_file(&archive).unwrap();
    }
}

/// A file of zeros wherever zeros are written to it.
struct Sparse(File);

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static ZEROS: [u8; 1 << 18] = [0; 1 << 18];
        match bytes == &ZEROS[..bytes.len().min(ZEROS.len())] {
            true => self.0.seek(SeekFrom::Current(bytes.len() as i64)).map(|_| bytes.len()),
            false => self.0.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let len = self.0.stream_position()?;
        self.0.set_len(len)
    }
}

/// Two small files around one of this size, which is all zeros.
fn archive_with(size: u64, path: &Path) -> Vec<Added> {
    let mut archive = Archive::new(Sparse(File::create(path).unwrap()));
    let header = |size| Header { mode: c::S_IFREG | 0o644, nlink: 1, size, ..Header::default() };
    let mut added = vec![archive.add(&header(5), b"before", &mut &b"hello"[..]).unwrap()];
    let zeros = &mut io::repeat(0).take(size);
    added.push(archive.add(&header(size), b"large", zeros).unwrap());
    added.push(archive.add(&header(5), b"after", &mut &b"hello"[..]).unwrap());
    archive.finish(512).unwrap();
    added
}

#[test]
fn the_largest_file_of_odc_is_read_by_all() {
    let (_dir, base) = place();
    let (path, size) = (base.join("archive"), (1u64 << 33) - 1);
    let added = archive_with(size, &path);
    assert!(added.iter().all(|it| matches!(it, Added::Whole { notes, .. } if notes.is_empty())));
    let all = [&b"before"[..], b"large", b"after"];
    assert_eq!(Tool::Gnu.list(&path), all);
    assert_eq!(Tool::Bsd.list(&path), all);
    // Ours, by position, without reading what is between.
    let Added::Whole { position, .. } = added[2] else { panic!() };
    let mut file = File::open(&path).unwrap();
    file.seek(SeekFrom::Start(position)).unwrap();
    let member = Reader::at(file, position).next_member().unwrap().unwrap();
    assert_eq!(member.name, b"after");
    assert_eq!(position, 76 + 7 + 5 + 76 + 6 + size);
}

#[test]
fn a_larger_file_is_noted_and_read_by_who_can() {
    let (_dir, base) = place();
    let (path, size) = (base.join("archive"), 1u64 << 33);
    let added = archive_with(size, &path);
    let notes = |it: &Added| match it {
        Added::Whole { notes, .. } => notes.clone(),
        Added::Failed { errno } => panic!("{errno}"),
    };
    assert_eq!(added.iter().map(notes).collect::<Vec<_>>(), [vec![], vec![Note::Large], vec![]]);
    let mut reader = Reader::new(File::open(&path).unwrap());
    reader.next_member().unwrap();
    let member = reader.next_member().unwrap().unwrap();
    assert_eq!((member.format, member.header.size), (Format::Large, size));
    let all = [&b"before"[..], b"large", b"after"];
    assert_eq!(Tool::Bsd.list(&path), all);
    assert_eq!(Tool::Afio.list(&path), all);
}

#[test]
fn what_odc_cannot_say_is_noted_and_nowhere_another_value_by_accident() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    need_root("it makes device nodes");
    fs::create_dir(&source).unwrap();
    shell(
        &source,
        "for name in old future last first owner group; do echo $name >$name; done
         chmod 6755 owner group; chown 262144:0 owner; chown 0:262144 group; chmod 6755 owner group
         touch -d @-1 old; touch -d @8589934592 future; touch -d @8589934591 last; touch -d @0 first
         mknod node c 300 70000; mknod edge c 1023 255",
    );
    let cases: &[(&[u8], &[Note])] = &[
        (b"old", &[Note::Mtime]),
        (b"future", &[Note::Mtime]),
        (b"last", &[]),
        (b"first", &[]),
        (b"owner", &[Note::Owner]),
        (b"group", &[Note::Owner]),
        (b"node", &[Note::Large]),
        (b"edge", &[]),
    ];
    let names: Vec<Vec<u8>> = cases.iter().map(|it| it.0.to_vec()).collect();
    for ((name, expected), added) in cases.iter().zip(write(&source, &names, &archive)) {
        let Added::Whole { notes, .. } = added else { panic!("{name:?}") };
        assert_eq!(notes, *expected, "{:?}", String::from_utf8_lossy(name));
    }
    let original = tree(&source, &names);
    assert_eq!(
        original[&b"future"[..]].mtime,
        8_589_934_592,
        "needs a file system of 64-bit times"
    );
    let mut expected = original.clone();
    let mut change = |name: &[u8], change: fn(&mut Facts)| change(expected.get_mut(name).unwrap());
    change(b"old", |it| it.mtime = 0);
    change(b"future", |it| it.mtime -= 1);
    change(b"owner", |it| (it.owner, it.mode) = ((65_534, 0), it.mode & !0o6000));
    change(b"group", |it| (it.owner, it.mode) = ((0, 65_534), it.mode & !0o6000));
    assert_eq!(read(&archive), expected);
    for tool in Tool::ALL {
        let dir = base.join(format!("{tool:?}"));
        tool.extract(&archive, &dir);
        let mut names = names.clone();
        if tool == Tool::Gnu {
            // It looks for the next header that it knows, byte by byte: so the note is there.
            assert!(!dir.join("node").exists(), "{tool:?} has learnt afio's large header");
        }
        if tool != Tool::Afio {
            // libarchive knows the large header and not the device's number in it.
            names.retain(|it| it != b"node");
        }
        for (name, facts) in tree(&dir, &names) {
            assert_eq!(facts, expected[&name], "{tool:?}: {}", String::from_utf8_lossy(&name));
        }
    }
}

#[test]
fn long_paths_come_back() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    fs::create_dir(&source).unwrap();
    let root = sys::open_dir(&source).unwrap();
    let mut names: Vec<Vec<u8>> = Vec::new();
    let mut dir = root.try_clone().unwrap();
    for n in 0..15u8 {
        let part = vec![b'a' + n; 255];
        let name = OsStr::from_bytes(&part);
        sys::at::mkdir(&dir, name, 0o755).unwrap();
        dir = sys::at::open_dir(&dir, name).unwrap();
        let before = names.last().map_or(Vec::new(), |it| [it, &b"/"[..]].concat());
        names.push([before, part].concat());
    }
    let last = [names.last().unwrap(), &b"/"[..], &[b'z'; 255]].concat();
    assert_eq!(last.len(), 4095);
    sys::at::create_file(&dir, OsStr::from_bytes(&[b'z'; 255]))
        .unwrap()
        .write_all(b"deep")
        .unwrap();
    names.push(last);
    assert!(write(&source, &names, &archive).iter().all(|it| matches!(it, Added::Whole { .. })));
    assert_eq!(read(&archive).len(), 16);
    for tool in [Tool::Gnu, Tool::Bsd] {
        assert_eq!(tool.list(&archive), names, "{tool:?}");
    }
    // afio takes names of 1022 bytes at most.
    let short: Vec<Vec<u8>> = names.into_iter().filter(|it| it.len() < 1023).collect();
    write(&source, &short, &archive);
    assert_eq!(Tool::Afio.list(&archive), short);
}

#[test]
fn what_cannot_be_read_has_failed_and_the_rest_is_there() {
    let (_dir, base) = place();
    let (source, archive) = (base.join("source"), base.join("archive"));
    fs::create_dir(&source).unwrap();
    let names = ["good", "gone", "TRAILER!!!", "new\nline", "file/x", "", "after"];
    let names = names.map(|it| it.replace("\\n", "\n").into_bytes());
    for name in ["good", "TRAILER!!!", "new\nline", "file", "after"] {
        fs::write(source.join(name), name).unwrap();
    }
    let added = write(&source, &names, &archive);
    let errno = |it: &Added| match it {
        Added::Whole { .. } => 0,
        Added::Failed { errno } => *errno,
    };
    let expected = [0, c::ENOENT, c::EINVAL, c::EINVAL, c::ENOTDIR, c::EINVAL, 0];
    assert_eq!(added.iter().map(errno).collect::<Vec<_>>(), expected);
    for tool in Tool::ALL {
        assert_eq!(tool.list(&archive), [&b"good"[..], b"after"], "{tool:?}");
    }
}

#[test]
fn a_name_may_be_absolute() {
    let (_dir, base) = place();
    let archive = base.join("archive");
    fs::write(base.join("file"), "x").unwrap();
    fs::set_permissions(base.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    let name = base.join("file").as_os_str().as_bytes().to_vec();
    let added = write(Path::new("/proc"), std::slice::from_ref(&name), &archive);
    assert!(matches!(added[..], [Added::Whole { position: 0, .. }]));
    assert_eq!(Tool::Gnu.list(&archive), std::slice::from_ref(&name));
    assert_eq!(read(&archive)[&name].content, b"x");
}

#[test]
fn the_archives_of_libarchives_tests_are_read() {
    // Of libarchive 3.6.2, licensed as it is (BSD, two clauses): every cpio archive of its tests
    // that is not compressed, of all formats and of several programs.
    let (_dir, base) = place();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/libarchive-cpio.tar.zst");
    let input = zstd::Decoder::new(File::open(data).unwrap()).unwrap();
    tar::Archive::new(input).unpack(&base).unwrap();
    let mut formats = Vec::new();
    for entry in fs::read_dir(&base).unwrap() {
        let path = entry.unwrap().path();
        let mut reader = Reader::new(File::open(&path).unwrap());
        let mut names = Vec::new();
        while let Some(member) = reader.next_member().unwrap() {
            formats.push(format!("{:?}", member.format));
            names.push(member.name);
        }
        assert_eq!(names, Tool::Gnu.list(&path), "{}", path.display());
    }
    formats.sort();
    formats.dedup();
    let all = ["Binary { is_big_endian: false }", "Binary { is_big_endian: true }"];
    assert_eq!(formats, [&all[..], &["Newc", "NewcSummed", "Odc"]].concat());
}
