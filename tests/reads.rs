//! Reading snapshots: ahead, in parts, from other copies, and past the program.
//!
//! The library is asked directly: what the kernel asks for, and when, is its own affair.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use raidtape::error::ErrorKind;
use raidtape::snapshot::{CacheStats, FileMap, Snapshots};

use crate::common::data::Seeded;
use crate::common::{Sandbox, wait_for};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A store of one run.
struct Store {
    sandbox: Sandbox,
}

impl Store {
    /// Files of this content, in blocks of at most 4 MiB if `init` says nothing else.
    fn of(files: &[(&str, &[u8])], init: &[&str]) -> Store {
        let small: &[&str] = &["--block-size", "4MiB"];
        let sandbox = Sandbox::with(if init.is_empty() { small } else { init });
        for (name, content) in files {
            fs::write(sandbox.source.join(name), content).unwrap();
        }
        sandbox.backup();
        Store { sandbox }
    }

    fn open(&self, cache: usize) -> Snapshots {
        Snapshots::open(&self.sandbox.catalog, cache as u64).unwrap()
    }

    /// The block files.
    fn blocks(&self) -> Vec<PathBuf> {
        self.sandbox.blocks("volume").into_iter().map(|it| it.0).collect()
    }
}

fn file(snapshots: &Snapshots, name: &str) -> Arc<FileMap> {
    let run = snapshots.latest().unwrap().unwrap();
    let root = snapshots.root(&run).unwrap().child.unwrap();
    let entry = snapshots.lookup(run.id, root, name.as_bytes()).unwrap().unwrap();
    snapshots.file(entry.version).unwrap()
}

/// Reads a file in pieces, in order; the bytes up to the first error.
fn read_all(snapshots: &Snapshots, file: &FileMap, piece: usize) -> (Vec<u8>, Option<ErrorKind>) {
    let mut content = Vec::new();
    loop {
        match snapshots.read_data(file, content.len() as u64, piece) {
            Ok(data) if data.is_empty() => return (content, None),
            Ok(data) => content.extend_from_slice(&data),
            Err(e) => return (content, Some(e.kind())),
        }
    }
}

/// The figures once no more is read ahead.
fn settled(snapshots: &Snapshots) -> CacheStats {
    let (mut last, mut since) = (snapshots.cache_stats(), Instant::now());
    wait_for("reading ahead to end", || {
        let now = snapshots.cache_stats();
        if now.ahead != last.ahead || now.bytes != last.bytes {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(100)
    });
    last
}

#[test]
fn a_reader_in_order_gets_the_right_bytes_with_any_cache() {
    let text = Seeded::new(501).text(11 * MIB + 12_345);
    let store = Store::of(&[("text", &text)], &[]);
    for cache in [0, 1, 100 * KIB, MIB, 3 * MIB, 64 * MIB] {
        for piece in [64 * KIB, 128 * KIB, MIB] {
            let snapshots = store.open(cache);
            let (content, error) = read_all(&snapshots, &file(&snapshots, "text"), piece);
            assert_eq!(error, None);
            assert!(content == text, "cache {cache}, pieces of {piece}");
            let stats = settled(&snapshots);
            assert!(stats.bytes <= cache as u64 && stats.ahead_bytes <= stats.bytes);
            match cache {
                // All of it is used, for nothing follows.
                c if c == 64 * MIB => {
                    assert!(stats.ahead > 0, "{stats:?}");
                    assert_eq!((stats.ahead, stats.ahead_bytes), (stats.ahead_used, 0));
                }
                c if c < MIB => assert_eq!(stats.ahead, 0, "{stats:?}"),
                _ => {}
            }
        }
    }
}

#[test]
fn each_frame_is_decompressed_once_for_a_reader_in_order() {
    let text = Seeded::new(502).text(10 * MIB);
    let store = Store::of(&[("text", &text)], &[]);
    let snapshots = store.open(64 * MIB);
    assert!(read_all(&snapshots, &file(&snapshots, "text"), 128 * KIB).0 == text);
    let frames = settled(&snapshots);
    assert!(read_all(&snapshots, &file(&snapshots, "text"), MIB).0 == text);
    let again = settled(&snapshots);
    assert_eq!((again.misses, again.ahead), (frames.misses, frames.ahead));
    // The first frames may have been begun in part, before it was seen that the reads are in order.
    let all = frames.misses + frames.ahead;
    assert!((40..=80).contains(&all), "{all} loads of 10 MiB in frames of 128 to 256 KiB");
}

#[test]
fn many_at_once_share_frames() {
    let text = Seeded::new(503).text(9 * MIB);
    let noise = Seeded::new(504).noise(9 * MIB);
    let store = Store::of(&[("text", &text), ("noise", &noise)], &[]);
    let snapshots = store.open(32 * MIB);
    let both = [(file(&snapshots, "text"), &text), (file(&snapshots, "noise"), &noise)];
    std::thread::scope(|scope| {
        for reader in 0..16 {
            let (snapshots, (file, content)) = (&snapshots, &both[reader % 2]);
            scope.spawn(move || {
                if reader < 8 {
                    assert!(read_all(snapshots, file, 128 * KIB).0 == **content);
                }
                let mut seeded = Seeded::new(600 + reader as u64);
                for _ in 0..200 {
                    let at = seeded.below(content.len() as u64) as usize;
                    let len = seeded.below(300_000) as usize;
                    let data = snapshots.read_data(file, at as u64, len).unwrap();
                    assert!(data[..] == content[at..content.len().min(at + len)]);
                }
            });
        }
    });
    let stats = settled(&snapshots);
    assert!(stats.bytes <= 32 * MIB as u64);
}

#[test]
fn readers_that_jump_cause_no_reading_ahead_and_small_reads_one_frame() {
    let text = Seeded::new(505).text(24 * MIB);
    let store = Store::of(&[("text", &text)], &[]);
    for size in [4 * KIB, 64 * KIB] {
        let snapshots = store.open(64 * MIB);
        let map = file(&snapshots, "text");
        let mut seeded = Seeded::new(506);
        for _ in 0..40 {
            let at = seeded.below((text.len() / size) as u64) as usize * size;
            let before = snapshots.cache_stats().misses;
            let data = snapshots.read_data(&map, at as u64, size).unwrap();
            assert!(data[..] == text[at..at + size]);
            let loads = snapshots.cache_stats().misses - before;
            // Frames end where chunks do, so that even 4 KiB may lie in two of them; 4 KiB within
            // one never take more than that one.
            assert!(loads <= 2, "{loads}");
            let own = data.len() as u64;
            drop(data);
            let again = snapshots.cache_stats().misses;
            let half = snapshots.read_data(&map, at as u64, size / 2).unwrap();
            assert!(half.len() as u64 <= own && snapshots.cache_stats().misses == again);
        }
        let stats = settled(&snapshots);
        assert_eq!(stats.ahead, 0, "{stats:?}");
    }
}

/// Many small files share frames of 1 MiB; the start of one is not paid for with all of it.
#[test]
fn what_is_read_of_a_frame_is_what_is_kept_of_it_until_more_is_wanted() {
    let texts: Vec<Vec<u8>> = (0..60).map(|it| Seeded::new(it).text(100 * KIB)).collect();
    let names: Vec<String> = (0..60).map(|it| format!("f{it:02}")).collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().zip(&texts).map(|(name, text)| (&**name, &**text)).collect();
    let store = Store::of(&files, &[]);
    let snapshots = store.open(64 * MIB);
    let first = file(&snapshots, "f00");
    assert!(snapshots.read_data(&first, 0, 4 * KIB).unwrap()[..] == texts[0][..4 * KIB]);
    let stats = snapshots.cache_stats();
    assert_eq!((stats.misses, stats.ahead), (1, 0));
    assert!(stats.bytes < 256 * KIB as u64, "{stats:?}");
    // In the order of the scan, frame after frame is there before it is asked for, if there is
    // time: the reader waits where the frames change, so that a busy machine cannot fail the test.
    for (at, (name, text)) in names.iter().zip(&texts).enumerate() {
        if at % 10 == 9 {
            settled(&snapshots);
        }
        assert!(read_all(&snapshots, &file(&snapshots, name), MIB).0 == *text);
    }
    let stats = settled(&snapshots);
    assert!(stats.ahead >= 2 && stats.ahead_used >= 2, "{stats:?}");
    assert!(stats.ahead_bytes <= 16 * MIB as u64);
}

/// Where a long text's bytes are damaged, the reads before that are not, nor is any other file.
#[test]
fn damage_ahead_is_told_to_who_reads_it() {
    let (text, other) = (Seeded::new(507).text(20 * MIB), Seeded::new(508).text(20 * MIB));
    let store = Store::of(&[("other", &other), ("text", &text)], &[]);
    // A byte in the middle of one block, whichever file has it.
    let block = store.blocks().remove(0);
    let len = fs::metadata(&block).unwrap().len();
    let at = len / 2;
    let disk = fs::File::options().read(true).write(true).open(&block).unwrap();
    let mut byte = [0];
    disk.read_exact_at(&mut byte, at).unwrap();
    disk.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let snapshots = store.open(64 * MIB);
    let mut damaged = 0;
    for (name, content) in [("text", &text), ("other", &other)] {
        let (got, error) = read_all(&snapshots, &file(&snapshots, name), 128 * KIB);
        assert!(got[..] == content[..got.len()]);
        match error {
            None => assert_eq!(got.len(), content.len()),
            Some(kind) => {
                damaged += 1;
                assert_eq!(kind, ErrorKind::Corrupt);
                // What lies behind the damage is there.
                let map = file(&snapshots, name);
                let after = got.len() + MIB;
                let rest = snapshots.read_data(&map, after as u64, 64 * KIB).unwrap();
                assert!(rest[..] == content[after..after + 64 * KIB]);
            }
        }
    }
    assert_eq!(damaged, 1);
    disk.write_all_at(&byte, at).unwrap();
    let mended = file(&snapshots, "text");
    assert!(read_all(&snapshots, &mended, MIB).0 == text, "an error is remembered");
}

#[test]
fn raw_frames_are_checked_wherever_they_are_read() {
    let noise = Seeded::new(509).noise(9 * MIB);
    let store = Store::of(&[("noise", &noise)], &[]);
    let blocks = store.blocks();
    for block in &blocks {
        let disk = fs::File::options().write(true).open(block).unwrap();
        disk.write_all_at(b"damage", fs::metadata(block).unwrap().len() - 10).unwrap();
    }
    for piece in [4 * KIB, 128 * KIB, 4 * MIB] {
        let snapshots = store.open(16 * MIB);
        let map = file(&snapshots, "noise");
        let mut failed = 0;
        for at in (0..noise.len()).step_by(piece) {
            match snapshots.read_data(&map, at as u64, piece) {
                Ok(data) => assert!(data[..] == noise[at..noise.len().min(at + piece)]),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Corrupt);
                    failed += 1;
                }
            }
        }
        assert!(failed >= blocks.len().min(noise.len() / piece), "{failed}");
    }
}

/// A block on two volumes is read from the one that has it whole.
#[test]
fn a_further_copy_serves_where_one_is_damaged() {
    let (text, noise) = (Seeded::new(514).text(3 * MIB), Seeded::new(515).noise(9 * MIB));
    let store = Store::of(&[("text", &text), ("noise", &noise)], &["--block-size", "16MiB"]);
    let second = store.sandbox.add_volume("second");
    let conn = rusqlite::Connection::open(&store.sandbox.catalog).unwrap();
    conn.execute("INSERT INTO block_copies SELECT block, 2, record_at FROM block_copies", [])
        .unwrap();
    drop(conn);
    let volume = store.sandbox.path("volume");
    for (number, block) in store.blocks().iter().enumerate() {
        let copy = second.join(block.strip_prefix(&volume).unwrap());
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(block, &copy).unwrap();
        match number % 2 {
            0 => fs::remove_file(block).unwrap(),
            _ => fs::write(block, vec![0; fs::metadata(block).unwrap().len() as usize]).unwrap(),
        }
    }
    let check = |cache| {
        let snapshots = store.open(cache);
        for (name, content) in [("text", &text), ("noise", &noise)] {
            let (got, error) = read_all(&snapshots, &file(&snapshots, name), 128 * KIB);
            assert!(error.is_none() && got == *content, "{name}: {error:?}");
        }
        assert!(whole(&snapshots, "noise").unwrap() == noise);
    };
    check(0);
    check(16 * MIB);
    // A volume that is away is one whose copies are not asked for.
    fs::rename(&volume, store.sandbox.path("away")).unwrap();
    check(0);
}

fn whole(snapshots: &Snapshots, name: &str) -> Option<Vec<u8>> {
    let mut block = snapshots.whole_block(&file(snapshots, name)).unwrap()?;
    let mut content = Vec::new();
    block.file.read_to_end(&mut content).unwrap();
    Some(content)
}

#[test]
fn a_file_that_is_one_raw_block_can_be_read_past_the_program() {
    let noise = Seeded::new(510).noise(9 * MIB);
    let text = Seeded::new(511).text(9 * MIB);
    let long = Seeded::new(512).noise(20 * MIB);
    let files: [(&str, &[u8]); 5] =
        [("noise", &noise), ("text", &text), ("long", &long), ("small", b"s"), ("empty", b"")];
    let store = Store::of(&files, &["--block-size", "16MiB"]);
    let snapshots = store.open(16 * MIB);
    assert!(whole(&snapshots, "noise").unwrap() == noise);
    for name in ["text", "long", "empty"] {
        assert!(whole(&snapshots, name).is_none(), "{name}");
    }
    // Alone in its block, if its block is raw.
    assert!(whole(&snapshots, "small").is_none_or(|it| it == b"s"));
    let block = snapshots.whole_block(&file(&snapshots, "noise")).unwrap().unwrap();
    let same = snapshots.whole_block(&file(&snapshots, "noise")).unwrap().unwrap();
    assert_eq!(block.number, same.number);
}

#[test]
fn a_block_that_is_not_as_written_is_not_handed_out() {
    let noise = Seeded::new(513).noise(9 * MIB);
    let store = Store::of(&[("noise", &noise)], &["--block-size", "16MiB"]);
    let [block] = &store.blocks()[..] else { panic!("one block") };
    let good = fs::read(block).unwrap();
    let snapshots = store.open(16 * MIB);
    assert!(whole(&snapshots, "noise").unwrap() == noise);
    for bad in [
        good[..good.len() - 1].to_vec(),
        [&good[..], b"more"].concat(),
        [&good[..5 * MIB], b"damage", &good[5 * MIB + 6..]].concat(),
    ] {
        fs::write(block, &bad).unwrap();
        assert!(whole(&snapshots, "noise").is_none());
        assert!(whole(&store.open(0), "noise").is_none());
    }
    fs::remove_file(block).unwrap();
    assert!(whole(&snapshots, "noise").is_none());
    fs::write(block, &good).unwrap();
    assert!(whole(&snapshots, "noise").unwrap() == noise);
}

/// Contents of neighbours come together, and are those of the versions that were asked for.
#[test]
fn contents_of_many_versions_are_each_their_own() {
    let sandbox = Sandbox::new();
    let dir = sandbox.source.clone();
    for number in 0..300 {
        let path = dir.join(format!("f{number:03}"));
        match number % 4 {
            0 => fs::write(&path, "").unwrap(),
            1 => std::os::unix::fs::symlink(format!("to {number}"), &path).unwrap(),
            _ => fs::write(&path, format!("{number}").repeat(number)).unwrap(),
        }
    }
    sandbox.backup();
    let snapshots = Snapshots::open(&sandbox.catalog, MIB as u64).unwrap();
    check_contents(&snapshots, &dir);
    fs::write(dir.join("f002"), "changed").unwrap();
    fs::write(dir.join("g"), "new").unwrap();
    sandbox.backup();
    check_contents(&snapshots, &dir);
}

fn check_contents(snapshots: &Snapshots, dir: &Path) {
    let run = snapshots.latest().unwrap().unwrap();
    let root = snapshots.root(&run).unwrap().child.unwrap();
    let entries = snapshots.list(run.id, root, None, 1000).unwrap();
    assert!(entries.len() >= 300);
    for entry in entries {
        let path = dir.join(std::str::from_utf8(&entry.name).unwrap());
        let map = snapshots.file(entry.version).unwrap();
        match fs::read_link(&path) {
            Ok(target) => {
                let target = target.into_os_string().into_encoded_bytes();
                assert_eq!(map.content.extra.target, Some(target));
            }
            Err(_) => {
                let (content, error) = read_all(snapshots, &map, MIB);
                assert_eq!((content, error), (fs::read(&path).unwrap(), None));
            }
        }
    }
}
