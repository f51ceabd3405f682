//! The writable tree and its disk: what fsync promised is there whatever happens, and a full disk
//! is told to the writer and harms nobody else.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use crate::common::disk::Disk;
use crate::common::mount::{self, Clear};
use crate::common::{Mount, Sandbox, Tree, assert_same, data, errno, tool, wait_for};

const ENOSPC: i32 = 28;
const ENOTCONN: i32 = 107;

fn sync_dir(dir: &Path) {
    File::open(dir).unwrap().sync_all().unwrap();
}

#[test]
fn what_was_synced_survives_the_death_of_the_mount() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 90, 20);
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let mut mount = sandbox.mount();
    let inside = mount.point.join("ingest");
    let at = |name: &str| inside.join(name);
    fs::create_dir(at("d")).unwrap();
    let mut file = File::create(at("d/file")).unwrap();
    file.write_all(b"synced").unwrap();
    file.sync_all().unwrap();
    fs::write(at("d/old name"), "renamed").unwrap();
    File::open(at("d/old name")).unwrap().sync_data().unwrap();
    fs::rename(at("d/old name"), at("d/new name")).unwrap();
    fs::hard_link(at("d/file"), at("d/second")).unwrap();
    sync_dir(&at("d"));
    sync_dir(&at(""));
    let dir = File::open(at("d")).unwrap();
    mount.kill();

    // What is open gives errors, and hangs nobody.
    assert_eq!(errno(fs::read_dir(at("d"))), ENOTCONN);
    assert_eq!(errno(file.sync_all()), ENOTCONN);
    assert_eq!(errno(dir.sync_all()), ENOTCONN);
    assert_eq!(errno(File::create(at("d/file"))), ENOTCONN);
    drop((file, dir));
    mount::detach(&mount.point);

    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    assert_eq!(fs::read(at("d/file")).unwrap(), b"synced");
    assert_eq!(fs::read(at("d/second")).unwrap(), b"synced");
    assert_eq!(fs::read(at("d/new name")).unwrap(), b"renamed");
    assert!(!at("d/old name").exists());
    assert_same(&source, &Tree::of(&mount.run(1)));
}

/// A catalog whose ingest tree lies on a small disk of its own; its store does not. `stacked`: with
/// an overlay in between, past which the kernel leaves nothing to itself.
fn on_small_disk(mib: u64, stacked: bool) -> (Sandbox, Disk, Clear, Mount) {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 91, 20);
    sandbox.backup();
    let point = sandbox.path("catalog.ingest");
    let name = if stacked { "below" } else { "catalog.ingest" };
    let disk = Disk::ext4(&sandbox, name, mib);
    let _ = fs::remove_dir(disk.point.join("lost+found"));
    let clear = Clear(if stacked { point.clone() } else { sandbox.path("nothing") });
    if stacked {
        fs::create_dir(&point).unwrap();
        // All on one disk: only then an overlay shows one device number.
        for dir in ["lower", "upper", "work"] {
            fs::create_dir(disk.point.join(dir)).unwrap();
        }
        let below = disk.point.display();
        let options = format!("lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work");
        tool("mount", ["-t", "overlay", "overlay", "-o", &options, point.to_str().unwrap()]);
    }
    let mount = sandbox.mount();
    fs::write(mount.point.join("ingest/first"), "").unwrap();
    let status = fs::read_to_string(mount.ctl("status")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let passed = status["ingest"]["passed"].as_u64().unwrap();
    assert!(passed == 0 || !stacked, "{status}");
    (sandbox, disk, clear, mount)
}

/// A removed file is freed when the kernel has told the mount that it has forgotten it.
fn has_room(disk: &Disk) {
    wait_for("room on the disk", || disk.free() > 9 << 20);
}

/// Fills what is left, in pieces that get smaller; what was written is there, to the byte.
fn fill(path: &Path) -> Vec<u8> {
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    let mut seeded = data::Seeded::new(7);
    let mut written = Vec::new();
    let mut size = 1 << 20;
    while size >= 4096 {
        let piece = seeded.noise(size);
        match file.write(&piece) {
            Ok(len) => written.extend(&piece[..len]),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(ENOSPC), "{e}");
                size /= 4;
            }
        }
    }
    file.sync_all().unwrap();
    written
}

#[test]
fn a_full_disk_is_told_to_the_writer_and_harms_nobody_else() {
    let (sandbox, disk, _clear, mount) = on_small_disk(24, false);
    let source = Tree::of(&sandbox.source);
    let at = |name: &str| mount.point.join("ingest").join(name);
    fs::write(at("small"), "there before").unwrap();
    let written = fill(&at("filler"));
    assert!(written.len() > 10 << 20);
    assert_eq!(fs::read(at("filler")).unwrap(), written);

    // Each way to ask for room is told that there is none.
    let mut more = OpenOptions::new().append(true).open(at("small")).unwrap();
    let noise = data::Seeded::new(8).noise(1 << 20);
    assert_eq!(errno(more.write_all(&noise)), ENOSPC);
    let len = fs::metadata(at("small")).unwrap().len() as usize;
    let told = fs::read(at("small")).unwrap();
    assert_eq!(told, [b"there before", &noise[..len - 12]].concat());
    let allocated = rustix::fs::fallocate(more.as_fd(), FallocateFlags::empty(), 0, 8 << 20);
    assert_eq!(allocated, Err(rustix::io::Errno::NOSPC));
    let made: Vec<_> = (0..200_000)
        .map(|n| File::create(at(&format!("n{n}"))))
        .take_while(|it| it.is_ok())
        .collect();
    assert!(made.len() < 200_000);
    drop(made);
    assert_eq!(errno(fs::create_dir(at(&"long name".repeat(20)))), ENOSPC);

    // Everybody else goes on, and what is there is there.
    assert_same(&source, &Tree::of(&mount.run(1)));
    assert_eq!(fs::read(at("filler")).unwrap(), written);
    assert_eq!(disk.free() / (1 << 20), 0);

    // And when there is room again, all is well.
    fs::remove_file(at("filler")).unwrap();
    for entry in fs::read_dir(at("")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().and_then(OsStr::to_str).is_some_and(|it| it.starts_with('n')) {
            fs::remove_file(path).unwrap();
        }
    }
    has_room(&disk);
    fs::write(at("again"), &noise).unwrap();
    let before = Tree::of(&at(""));
    crate::clearing::job(&mount, "ingest");
    assert_same(&before, &Tree::of(&mount.run(2)));
    drop(more);
    mount.end();
    sandbox.assert_valid();
}

/// Stores to mapped memory where there is no room: never a success that is none.
#[test]
fn mapped_writes_to_a_full_disk_are_not_taken_for_stored() {
    for stacked in [false, true] {
        map_on_a_full_disk(stacked);
    }
}

fn map_on_a_full_disk(stacked: bool) {
    let (_sandbox, disk, _clear, mount) = on_small_disk(24, stacked);
    let at = |name: &str| mount.point.join("ingest").join(name);
    // A file of holes, larger than what is left.
    File::create(at("mapped")).unwrap().set_len(8 << 20).unwrap();
    let room = fill(&at("filler"));
    assert!(room.len() > 10 << 20);
    // A process of its own: the kernel may end it by a signal instead of telling it.
    let script = "import mmap,os,sys\n\
                  fd = os.open(sys.argv[1], os.O_RDWR)\n\
                  m = mmap.mmap(fd, 8 << 20)\n\
                  for page in range(0, 8 << 20, 4096): m[page:page+4] = b'here'\n\
                  if sys.argv[2] == 'sync': m.flush(); os.fsync(fd)\n\
                  m.close()\n\
                  os.close(fd)\n";
    let python = |how: &str| {
        let mut python = std::process::Command::new("python3");
        python.args(["-c", script]).arg(at("mapped")).arg(how).output().unwrap()
    };
    // In this order: the kernel tells of an error until one sync has heard of it.
    for how in ["close", "sync"] {
        let said = python(how).status;
        assert!(!said.success(), "8 MiB were said to be stored where there is no room: {how}");
    }
    // The mount lives, and gives room again.
    assert_eq!(fs::read(at("filler")).unwrap(), room);
    fs::remove_file(at("filler")).unwrap();
    has_room(&disk);
    let ran = python("sync");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let content = fs::read(at("mapped")).unwrap();
    assert!(content.chunks(4096).all(|page| page.starts_with(b"here")));
    assert_eq!(tool("stat", ["-c", "%s", at("mapped").to_str().unwrap()]).text(), "8388608\n");
}

/// Attributes are right at once, whichever way the bytes went.
#[test]
fn attributes_are_right_at_once() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let path: PathBuf = mount.point.join("ingest/file");
    let times =
        |path: &Path| fs::metadata(path).map(|it| (it.len(), it.modified().unwrap())).unwrap();
    fs::write(&path, "x").unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let mut size = 1;
    for step in 0..5 {
        File::open(&path).unwrap().set_modified(old).unwrap();
        assert_eq!(times(&path), (size, old));
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        match step {
            0 => file.write_all_at(b"more", size).unwrap(),
            1 => {
                let mut append = OpenOptions::new().append(true).open(&path).unwrap();
                append.write_all(b"more").unwrap();
            }
            2 => file.set_len(size + 4).unwrap(),
            3 => {
                let fd = file.as_fd();
                rustix::fs::fallocate(fd, FallocateFlags::empty(), size, 4).unwrap();
            }
            _ => {
                let from = File::open(&path).unwrap();
                let (mut start, mut end) = (0, size);
                let done =
                    rustix::fs::copy_file_range(&from, Some(&mut start), &file, Some(&mut end), 4);
                assert_eq!(done, Ok(4));
            }
        }
        size += 4;
        let (now, modified) = times(&path);
        assert_eq!(now, size, "step {step}");
        assert!(modified > old, "step {step}");
        assert_eq!(file.metadata().unwrap().len(), size);
        assert_eq!(fs::read(&path).unwrap().len() as u64, size);
    }
}
