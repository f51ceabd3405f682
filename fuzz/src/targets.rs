//! What reads bytes that anybody may have written, as functions that take any bytes.
//!
//! A target must not panic, hang or take memory without bound, whatever it is given; what it reads
//! without an error it reads to its end. libFuzzer runs them (`scripts/fuzz`), and the tests run
//! them over the kept corpus.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use raidtape::catalog::replay::Rebuild;
use raidtape::catalog::{Checking, Reader, RunId, extent, history, meta_read};
use raidtape::chunk::HashAlgo;
use raidtape::chunk::frame::{Codec, Frame, get_frames};
use raidtape::entry::Extra;
use raidtape::error::ErrorKind;
use raidtape::job::grammar::{self, Site, VERBS};
use raidtape::tape::cpio::{Added, Archive, Format, Reader as CpioReader};
use raidtape::tape::drive::{Access, Drive, Moved, Read};
use raidtape::tape::image::Image;
use raidtape::tape::label::{FirstBlock, LABEL_BYTES, Label};
use raidtape::tape::spool::batch::Batch;
use raidtape::tape::spool::job::JobFile;
use raidtape::tape::spool::log::{LogLine, TapeFile, lines_of};
use raidtape::tape::spool::receipt::{Receipt, Receipts};
use raidtape::volume::{VolumeManifest, block};
use raidtape::wire::Reader as WireReader;
use xxhash_rust::xxh3::xxh3_64;

/// Reads any bytes.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("batch", batch),
    ("catalog", catalog),
    ("content", content),
    ("control-line", control_line),
    ("cpio", cpio),
    ("frame", frame),
    ("job-file", job_file),
    ("label", label),
    ("manifest", manifest),
    ("meta", meta),
    ("receipt", receipt),
    ("tap", tap),
    ("volume-index", volume_index),
    ("volume-manifest", volume_manifest),
];

/// Plain bytes that a frame may claim here; the real limit is tested elsewhere, and a claim of it
/// in every input would measure `memset`.
const PLAIN_BYTES_MAX: u32 = 1 << 16;

/// The label of a tape, alone and in its block.
fn label(data: &[u8]) {
    if let Ok(label) = Label::parse(data) {
        assert_eq!(Label::parse(&label.to_text()).unwrap(), label);
        assert_eq!(label.to_block().len(), LABEL_BYTES);
        let mut block = data.to_vec();
        block.resize(LABEL_BYTES, 0);
        // Only now: its hash takes longer than all the rest.
        assert!(matches!(FirstBlock::of(&block), FirstBlock::Labelled(it, _) if it == label));
        let mut made = Label::new(label.text()).unwrap();
        label.fields().for_each(|(key, value)| made.add(key, value).unwrap());
        assert_eq!(made.to_text(), label.to_text());
    }
}

/// An archive; what is read of one is written again and read again.
fn cpio(data: &[u8]) {
    const CONTENT_BYTES_MAX: usize = 1 << 16;
    let mut reader = CpioReader::new(data);
    let mut archive = Archive::new(Vec::new());
    let mut written = Vec::new();
    while let Ok(Some(member)) = reader.next_member() {
        assert!(member.position < data.len() as u64);
        let mut again = CpioReader::at(&data[member.position as usize..], member.position);
        assert_eq!(again.next_member().unwrap().unwrap(), member);
        let Ok(content) = reader.read_all(CONTENT_BYTES_MAX) else { break };
        assert_eq!(content.len() as u64, member.header.size);
        if let Ok(Added::Whole { position, .. }) =
            archive.add(&member.header, &member.name, &mut &*content)
        {
            written.push((position, member.name, content));
        }
    }
    assert!(reader.position() <= data.len() as u64);
    let archive = archive.finish(512).unwrap();
    let mut reader = CpioReader::new(&*archive);
    for (position, name, content) in written {
        let member = reader.next_member().unwrap().unwrap();
        assert_eq!((member.position, member.name), (position, name));
        assert!(matches!(member.format, Format::Odc | Format::Large));
        assert_eq!(reader.read_all(CONTENT_BYTES_MAX).unwrap(), content);
    }
    assert!(reader.next_member().unwrap().is_none());
}

/// A batch, to its end.
fn batch(data: &[u8]) {
    let Ok(mut batch) = Batch::read(data) else { return };
    while let Ok(Some(file)) = batch.next_file() {
        assert!(!file.is_empty() && !file.contains(&b'\n'));
    }
    let _ = batch.summary();
    while let Ok(Some(_)) = batch.next_result() {}
}

/// A job file, to its end; and the lines of logs.
fn job_file(data: &[u8]) {
    let read = |data: &[u8]| {
        let mut file = JobFile::read(data).ok()?;
        let fields = file.fields().clone();
        let mut batches = Vec::new();
        while let Some(batch) = file.next_batch().ok()? {
            batches.push(batch);
        }
        Some((fields, batches))
    };
    if let Some((fields, batches)) = read(data) {
        let lines: Vec<u8> =
            batches.iter().flat_map(|it| [it.to_line(), b"\n".to_vec()].concat()).collect();
        let text = [b"%job\n", &*fields.to_text(), b"\n%batches\n", &lines].concat();
        assert_eq!(read(&text), Some((fields, batches)));
    }
    let _ = lines_of(data, &mut |line| {
        assert_eq!(LogLine::parse(&LogLine::parse(line).to_line()), LogLine::parse(line));
        if let Some(file) = TapeFile::parse(line) {
            assert_eq!(TapeFile::parse(&file.to_line()), Some(file));
        }
        Ok(())
    });
}

/// Receipts, to their end; a line that is none does not end them.
fn receipt(data: &[u8]) {
    let mut receipts = Receipts::new(data);
    let mut is_inside = false;
    loop {
        match receipts.next_part() {
            Ok(None) => break,
            Ok(Some(Receipt::Begin)) => assert!(!std::mem::replace(&mut is_inside, true)),
            Ok(Some(Receipt::End { .. })) => assert!(std::mem::take(&mut is_inside)),
            Ok(Some(_)) => assert!(is_inside),
            // Each takes a line at least, so this ends.
            Err(_) => {}
        }
    }
    assert!(!is_inside);
}

/// A frame table, and a frame whose check is right.
fn frame(data: &[u8]) {
    let _ = get_frames(&mut WireReader::new(data, "frame table"));
    let Some((head, stored)) = data.split_first_chunk::<4>() else { return };
    let [kind, a, b, start] = *head;
    let plain_len = (u32::from_le_bytes([a, b, kind >> 4, 0]) % PLAIN_BYTES_MAX).max(1);
    let stored_len = u32::try_from(stored.len()).unwrap();
    let codec = if kind & 1 == 0 { Codec::Zstd } else { Codec::Raw };
    let plain_len = if codec == Codec::Raw { stored_len } else { plain_len };
    let frame = Frame { codec, stored_len, plain_len, check: xxh3_64(stored) };
    let mut plain = Vec::new();
    let is_whole = frame.decode(stored, &mut plain).is_ok();
    let len = plain_len as usize * usize::from(start) / 255;
    let mut part = vec![0; len];
    if frame.decode_start(stored, &mut part).is_ok() && is_whole {
        assert!(plain.starts_with(&part));
    }
}

/// An index of records: one that is cut anywhere, and one whose check is right.
fn volume_index(data: &[u8]) {
    let read = |bytes: &[u8]| {
        let mut reader = block::RecordReader::new(bytes, 0);
        while let Ok(Some(_)) = reader.next_record() {}
        assert!(reader.offset() <= bytes.len() as u64);
    };
    read(data);
    let mut record = u32::try_from(data.len()).unwrap().to_le_bytes().to_vec();
    record.extend(xxh3_64(data).to_le_bytes());
    record.extend(data);
    read(&record);
}

/// A volume's manifest.
fn volume_manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(manifest) = VolumeManifest::parse(text) {
        assert_eq!(VolumeManifest::parse(&manifest.to_text()).unwrap(), manifest);
    }
}

/// A line of a control file; its first byte is the verb.
fn control_line(data: &[u8]) {
    let Some((verb, line)) = data.split_first() else { return };
    let verb = VERBS[usize::from(*verb) % VERBS.len()];
    let site = Site { ingest_dir: PathBuf::from("/ingest"), mountpoint: PathBuf::from("/mnt") };
    let _ = grammar::parse(verb, line, &site);
}

/// What a version has besides metadata.
fn content(data: &[u8]) {
    let _ = extent::decode(data);
    if let Ok(extra) = Extra::decode(data) {
        assert_eq!(Extra::decode(&extra.encode()).unwrap(), extra);
    }
}

/// A meta.
fn meta(data: &[u8]) {
    let mut mappings = 0usize;
    let read = meta_read::read_text(data, &mut |_| {
        mappings += 1;
        Ok(())
    });
    if read.is_ok() {
        assert!(mappings <= data.len());
    }
}

/// Manifests that a catalog is being built from, one run each, until it is begun anew.
struct Building {
    dir: tempfile::TempDir,
    rebuild: Option<Rebuild>,
    run: RunId,
}

/// Runs that are replayed into one catalog.
const RUNS_MAX: RunId = 200;

impl Building {
    fn new() -> Building {
        let dir = tempfile::Builder::new().prefix("raidtape-fuzz-").tempdir_in("/dev/shm").unwrap();
        Building { dir, rebuild: None, run: 0 }
    }

    fn next(&mut self) -> (RunId, &mut Rebuild) {
        if self.run == RUNS_MAX {
            // First the lock of the former one has to go.
            self.rebuild = None;
            self.run = 0;
        }
        self.run += 1;
        let path = self.dir.path().join("catalog");
        (self.run, self.rebuild.get_or_insert_with(|| Rebuild::create(&path).unwrap()))
    }
}

/// A first line that is as it should be.
const HEAD: &[u8] = br#"{"op":"run","format":1,"run":1,"uuid":"a","source":"s","started":[1,0],
"hash_algo":"blake3"}"#;

/// A manifest as it is, one whose last line has the right digest, and its lines as they are taken
/// when a catalog is built from them.
fn manifest(data: &[u8]) {
    thread_local! {
        static BUILDING: RefCell<Building> = RefCell::new(Building::new());
    }
    let _ = history::survey_text(&mut &*data, &|| Ok(()));
    let lines: Vec<&[u8]> = data.split_inclusive(|it| *it == b'\n').collect();
    let Some((first, rest)) = lines.split_first() else { return };
    let mut text = data.to_vec();
    text.push(b'\n');
    let end = format!(
        r#"{{"op":"end","finished":[1,0],"added":0,"modified":0,"deleted":0,"unchanged":0,
"dirs_added":0,"dirs_modified":0,"dirs_deleted":0,"dirs_unchanged":0,"files":1,"bytes":5,
"bytes_read":0,"bytes_stored":0,"problems":0,"changes":{},"digest":"{}"}}"#,
        text.iter().filter(|it| **it == b'\n').count() - 1,
        HashAlgo::Blake3.hash(&text)
    )
    .replace('\n', "");
    text.extend(end.into_bytes());
    let survey = history::survey_text(&mut &*text, &|| Ok(()));
    let head = history::Head::parse(first).or_else(|_| history::Head::parse(HEAD));
    BUILDING.with_borrow_mut(|building| {
        let (run, rebuild) = building.next();
        let head = history::Head { run, uuid: format!("run-{run}"), ..head.unwrap() };
        let _ = rebuild.begin_run(&head);
        let is_taken = rest.iter().all(|it| rebuild.take_first(it).is_ok())
            && rest.iter().all(|it| rebuild.take_second(it).is_ok());
        let tail = survey.ok().and_then(|it| it.tail);
        let is_ended = rebuild.end_run(&head, tail.as_ref()).is_ok();
        // As whoever builds a catalog does at the first error.
        if !(is_taken && is_ended) {
            building.run = RUNS_MAX.min(building.run + 10);
        }
    });
}

/// A tape image: read from its beginning, and again by way of what is known of it then.
fn tap(data: &[u8]) {
    thread_local! {
        static PLACE: (tempfile::TempDir, PathBuf) = {
            let dir = tempfile::Builder::new().prefix("raidtape-fuzz-").tempdir_in("/dev/shm");
            let dir = dir.unwrap();
            let path = dir.path().join("a.tap");
            (dir, path)
        };
    }
    PLACE.with(|(_, path)| {
        std::fs::write(path, data).unwrap();
        let mut drive = Image::open(path, Access::Write).unwrap();
        let mut buffer = vec![0; data.len()];
        let mut marks = 0;
        let end = loop {
            match drive.read(&mut buffer) {
                Ok(Read::EndOfData) => break true,
                Ok(Read::Filemark) => marks += 1,
                Ok(Read::TooLong) => panic!("a block that is longer than the image"),
                Ok(Read::Block(len)) => assert!(len <= data.len()),
                // One that is marked as bad is passed.
                Err(e) if e.kind() == ErrorKind::Io => {}
                Err(_) => break false,
            }
        };
        let position = drive.position().unwrap();
        assert_eq!(drive.state().unwrap().file, Some(marks));
        assert_eq!(drive.locate(position / 2).unwrap(), Moved::There);
        if end {
            drive.to_end_of_data().unwrap();
            assert_eq!(drive.position().unwrap(), position);
            assert_eq!(drive.space_files(1).unwrap(), Moved::EndOfData);
            drive.space_files(-1).unwrap();
        } else {
            drive.to_end_of_data().unwrap_err();
            drive.locate(position + 1).unwrap_err();
        }
    });
}

/// A catalog of which bytes have been changed: pairs of a place (3 bytes) and what is there then.
fn catalog(data: &[u8]) {
    thread_local! {
        static PLACE: RefCell<(tempfile::TempDir, Vec<u8>)> = RefCell::new(template());
    }
    PLACE.with_borrow(|(dir, template)| {
        let mut bytes = template.clone();
        for change in data.chunks_exact(4) {
            let at = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
            let at = at % bytes.len();
            bytes[at] = change[3];
        }
        let path = dir.path().join("catalog");
        std::fs::write(&path, &bytes).unwrap();
        let _ = read_all(&path);
        for name in ["catalog-wal", "catalog-shm"] {
            let _ = std::fs::remove_file(dir.path().join(name));
        }
    });
}

fn template() -> (tempfile::TempDir, Vec<u8>) {
    let bytes = zstd::decode_all(&include_bytes!("../catalog.zst")[..]).unwrap();
    (tempfile::Builder::new().prefix("raidtape-fuzz-").tempdir_in("/dev/shm").unwrap(), bytes)
}

fn read_all(path: &Path) -> raidtape::error::Result<()> {
    let reader = Reader::open(path)?;
    let _ = reader.settings();
    let _ = reader.volumes();
    let _ = reader.check(&mut Checking::new(&mut |_| (), &|| Ok(())));
    let _ = reader.write_logical_dump(&mut std::io::sink());
    for number in reader.block_numbers(0, 100)? {
        let _ = reader.block(number);
    }
    for run in reader.runs()? {
        let _ = reader.problems(run.id);
        let _ = reader.changes(&run, &mut |_| Ok(()));
    }
    Ok(())
}
