//! Round trips through the database: every row that is written comes back as it was, and rows that
//! nobody wrote are refused.

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;
use crate::chunk::frame::Compression;
use crate::chunk::split::{Chunking, FASTCDC_SIZES};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::{Extra, Kind, Metadata};
use crate::error::Problem;
use crate::sys::Time;

fn any_kind() -> impl Strategy<Value = Kind> {
    (1u8..=7).prop_map(|number| Kind::from_number(number).unwrap())
}

fn any_time() -> impl Strategy<Value = Time> {
    (any::<i64>(), 0u32..1_000_000_000).prop_map(|(secs, nanos)| Time { secs, nanos })
}

/// Metadata as a file system may have it.
pub fn any_metadata() -> impl Strategy<Value = Metadata> {
    let small = (any_kind(), 0u32..=0o7777, any::<u32>(), any::<u32>());
    let large = (0u64..1 << 63, any::<u64>(), 0u64..1 << 63, any::<u64>());
    (small, (any_time(), any_time()), large).prop_map(
        |((kind, mode, uid, gid), (mtime, ctime), (size, ino, nlink, rdev))| Metadata {
            kind,
            mode,
            uid,
            gid,
            size,
            mtime,
            ctime,
            ino,
            nlink,
            rdev,
        },
    )
}

/// Content with any extents, whatever the file's size is.
pub fn any_content() -> impl Strategy<Value = Content> {
    let extent = (any::<bool>(), 1u64..1 << 40, 1u64..1 << 30, 0u64..1 << 40).prop_map(
        |(hole, len, block, offset)| match hole {
            true => Extent::Hole { len },
            false => Extent::Data { block, offset, len },
        },
    );
    let xattrs = prop::collection::vec(any::<(Vec<u8>, Vec<u8>)>(), 0..4);
    (
        any::<Option<[u8; 32]>>(),
        prop::collection::vec(extent, 0..9),
        any::<Option<Vec<u8>>>(),
        xattrs,
        any::<u32>(),
    )
        .prop_map(|(hash, extents, target, xattrs, flags)| Content {
            hash: hash.map(Digest),
            extents,
            // Only the flags that are kept.
            extra: Extra { target, xattrs, flags: flags & 0x2283_c4ff },
        })
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 1..=255)
        .prop_filter("one component", |name| crate::entry::check_name(name).is_ok())
}

fn settings() -> Settings {
    Settings {
        hash: HashAlgo::Blake3,
        chunking: Chunking::FastCdc { average: 64 << 10 },
        compression: Compression::Zstd(3),
        block_bytes: 128 << 20,
        reserve_percent: 10,
        copies: 1,
    }
}

/// Runs `cases` on one catalog: to make one for each would be most of the work.
fn with_catalog(cases: impl FnOnce(&std::path::Path, &mut Writer)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog");
    let mut writer = Writer::create(&path, &settings()).unwrap();
    cases(&path, &mut writer);
}

fn check<S: Strategy>(strategy: &S, test: impl Fn(S::Value) -> TestCaseResult)
where
    S::Value: std::fmt::Debug,
{
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    runner.run(strategy, test).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn entries_contents_and_runs_come_back() {
    with_catalog(|path, writer| {
        let writer = std::cell::RefCell::new(writer);
        let numbers = prop::collection::vec(0u64..1 << 40, 13);
        let texts = (any_name(), prop::collection::btree_set("[^\0]{0,9}", 0..3), "[^\0]{0,20}");
        let entry = (any_name(), any_metadata(), any_content(), any::<Option<u32>>());
        check(&(entry, numbers, texts, any_time(), any_time()), |case| {
            let ((name, meta, content, data_len), n, (source, tags, comment), started, finished) =
                case;
            let mut writer = writer.borrow_mut();
            let mut run = writer.begin_run(&source, std::path::Path::new("/s"), started)?;
            let version = run.new_version();
            // A directory that no other case has.
            let dir = version * 2;
            let child = (meta.kind == Kind::Dir).then_some(dir + 1);
            let data_len = data_len.map(u64::from);
            run.put_entry(&NewEntry { dir, name: &name, version, child, meta: &meta, data_len })?;
            run.put_content(version, meta.kind, &content)?;
            let tally = |at: usize| Tally {
                added: n[at],
                modified: n[at + 1],
                deleted: n[at + 2],
                unchanged: n[at + 3],
            };
            let counts = Counts {
                entries: tally(0),
                dirs: tally(4),
                files: n[8],
                bytes: n[9],
                bytes_read: n[10],
                bytes_stored: n[11],
                problems: n[12],
            };
            let tags: Vec<String> = tags.into_iter().collect();
            let problems = [Problem::new(&name[..], &Error::corrupt("bad"))];
            let id = run.commit(&counts, (&tags, &comment), &problems, finished)?;
            let uuid = run.uuid().to_owned();
            drop(run);

            let reader = Reader::open(path)?;
            let row = reader.lookup(id, dir, &name)?.unwrap();
            let (first_run, last_run) = (id, OPEN);
            let expected = EntryRow {
                dir,
                name: name.clone(),
                first_run,
                last_run,
                version,
                child,
                meta,
                data_len,
            };
            prop_assert_eq!(&row, &expected);
            prop_assert_eq!(reader.list(id, dir, None, 10)?, vec![expected.clone()]);
            prop_assert_eq!(reader.entry_of_version(version)?, Some(expected));
            // Only files have content, others what is extra.
            let expected = match (meta.kind, content.extra.is_empty()) {
                (Kind::File, _) => content,
                (_, true) => Content::default(),
                (_, false) => Content { extents: Vec::new(), ..content },
            };
            prop_assert_eq!(reader.content(version)?, expected);
            let run = reader.run(id)?;
            prop_assert_eq!((run.counts, run.uuid, run.tags), (counts, uuid, tags));
            prop_assert_eq!((run.started, run.finished), (started, finished));
            prop_assert_eq!((run.source, run.comment), (source, comment));
            let [(at, kind, message)] = &reader.problems(id)?[..] else { panic!("one problem") };
            prop_assert_eq!((at, &kind[..], &message[..]), (&name, "corrupt", "bad"));
            Ok(())
        });
    });
}

#[test]
fn settings_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let words = (any::<bool>(), any::<bool>(), 0i32..=19, 0u8..=99);
    let sizes = (*FASTCDC_SIZES.start()..=*FASTCDC_SIZES.end(), 24u32..=30);
    check(&(words, sizes, any::<u64>()), |((sha, fixed, level, reserve), (size, bits), n)| {
        let path = dir.path().join(format!("{n}"));
        let settings = Settings {
            hash: if sha { HashAlgo::Sha256 } else { HashAlgo::Blake3 },
            chunking: Chunking::new(if fixed { "fixed" } else { "fastcdc" }, size)?,
            compression: if level == 0 { Compression::None } else { Compression::Zstd(level) },
            block_bytes: 1 << bits,
            reserve_percent: reserve,
            copies: 1,
        };
        drop(Writer::create(&path, &settings)?);
        prop_assert_eq!(Reader::open(&path)?.settings()?, settings);
        Ok(())
    });
}

#[test]
fn any_row_is_read_or_refused() {
    with_catalog(|path, writer| {
        let mut run = writer.begin_run(b"s", std::path::Path::new("/s"), Time::now()).unwrap();
        let id = run.commit(&Counts::default(), (&[], ""), &[], Time::now()).unwrap();
        drop(run);
        let conn = rusqlite::Connection::open(path).unwrap();
        let reader = Reader::open(path).unwrap();
        let number = || prop_oneof![-3i64..10, any::<i64>()];
        let columns = prop::collection::vec(number(), 14);
        let blobs = prop::collection::vec(any::<Option<Vec<u8>>>(), 2);
        let entry = (any::<Vec<u8>>(), number(), any::<Option<i64>>(), columns);
        check(&(entry, blobs), |((name, dir, child, n), blobs)| {
            let query = "INSERT OR REPLACE INTO entries VALUES (?1, ?2, 1, ?3, 7, ?4, ?5, ?6, ?7, \
                         ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)";
            let row = rusqlite::params![
                dir, name, OPEN, child, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9],
                n[10], n[11], n[12]
            ];
            conn.execute(query, row).unwrap();
            let query = "INSERT OR REPLACE INTO versions VALUES (7, NULL, ?1, ?2)";
            conn.execute(query, (&blobs[0], &blobs[1])).unwrap();
            let kinds = [
                reader.lookup(id, dir, &name).err().map(|e| e.kind()),
                reader.list(id, dir, None, 10).err().map(|e| e.kind()),
                reader.entry_of_version(7).err().map(|e| e.kind()),
                reader.content(7).err().map(|e| e.kind()),
            ];
            for kind in kinds.into_iter().flatten() {
                prop_assert_eq!(kind, ErrorKind::Corrupt);
            }
            conn.execute_batch("DELETE FROM entries; DELETE FROM versions").unwrap();
            Ok(())
        });
    });
}

#[test]
fn a_run_gives_no_number_that_one_before_has_given() {
    with_catalog(|path, writer| {
        let begin = |writer: &mut Writer| {
            let mut run = writer.begin_run(b"s", std::path::Path::new("/s"), Time::now()).unwrap();
            let numbers = (run.run(), run.new_version(), run.new_dir());
            let meta = Metadata {
                kind: Kind::Dir,
                mode: 0o755,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: Time::default(),
                ctime: Time::default(),
                ino: 1,
                nlink: 1,
                rdev: 0,
            };
            let (version, child) = (numbers.1, Some(numbers.2));
            let root =
                NewEntry { dir: 0, name: b"/s", version, child, meta: &meta, data_len: None };
            run.put_entry(&root).unwrap();
            run.commit(&Counts::default(), (&[], ""), &[], Time::now()).unwrap();
            numbers
        };
        assert_eq!(begin(writer), (1, 1, 1));
        let conn = rusqlite::Connection::open(path).unwrap();
        conn.execute_batch("DELETE FROM entries; DELETE FROM runs").unwrap();
        assert_eq!(begin(writer), (2, 2, 2));
    });
}
