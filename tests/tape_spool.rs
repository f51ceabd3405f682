//! The spool: the document's files, those of the original program, and what crashes leave.
//!
//! Invariant: what is expected of a file is written out here as the document has it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use raidtape::error::{ErrorKind, Result};
use raidtape::tape::label::Label;
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::batch::{BatchStatus, Outcome, Summary};
use raidtape::tape::spool::drive::DriveStatus;
use raidtape::tape::spool::find::Found;
use raidtape::tape::spool::job::{Job, JobKind, JobStatus};
use raidtape::tape::spool::lock::Lock;
use raidtape::tape::spool::log::{LogLine, TapeFile};
use raidtape::tape::spool::receipt::{self, Receipt, Receipts};
use raidtape::tape::spool::tape::TapeStatus;
use raidtape::tape::spool::text::Fields;
use tempfile::TempDir;

use crate::common::faultfs::disk::Disk;
use crate::common::faultfs::{Cut, FaultFs, Image, Rules};

const A: &str = "28970c2a-8eea-4060-8fc9-574e562fda12";
const B: &str = "7a5ea04c-f6e5-41a3-895d-2ce6706aa1c6";
const C: &str = "9f90e336-bcaf-4bd0-8264-689331e79262";

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::Builder::new().prefix("raidtape-test-").tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    (dir, path)
}

fn spool(base: &Path) -> Spool {
    let spool = Spool::create(&base.join("t0p")).unwrap();
    spool.add_drive(OsStr::new("d0"), Path::new("/dev/nst0")).unwrap();
    spool
}

fn fields(pairs: &[(&str, &str)]) -> Fields {
    let mut fields = Fields::default();
    pairs.iter().for_each(|(key, value)| fields.set(key, value).unwrap());
    fields
}

fn names<'a>(names: &'a [&'a str]) -> impl Iterator<Item = Result<Vec<u8>>> + 'a {
    names.iter().map(|it| Ok(it.as_bytes().to_vec()))
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// What the engine does with a job: writes every pending batch, all but the first file well.
fn write_all(spool: &Spool, uuid: &str, tape: &str, filenum: u64) -> Result<()> {
    let mut job = spool.take_job(uuid)?;
    job.set_status(Some(JobStatus::Busy))?;
    let mut log = job.log()?;
    log.put(&LogLine::Job { job: uuid.as_bytes(), is_begin: true, time: 100 }.to_line())?;
    for (at, id) in job.pending()?.into_iter().enumerate() {
        let filenum = filenum + at as u64;
        let mut results = job.begin_results()?;
        let mut batch = job.batch(id)?;
        let (mut position, mut is_first) = (200, true);
        while let Some(path) = batch.next_file()? {
            match is_first {
                true => results.fail(2, path)?,
                false => results.ok(position, path)?,
            }
            (position, is_first) = (position + 100, false);
        }
        let tape = tape.as_bytes();
        log.put(&LogLine::Tape { tape, filenum, position: filenum * 10 }.to_line())?;
        log.sync()?;
        let known = spool.tape(tape)?.unwrap();
        let (job_name, batch) = (uuid.to_owned(), id.number);
        known.add_file(&TapeFile { filenum, position: filenum * 10, job: job_name, batch })?;
        let summary = Summary { begin: 100, end: 200, tape: tape.to_vec(), filenum };
        job.complete(id, results, &summary, BatchStatus::Written)?;
    }
    spool.finish(job)
}

fn find(spool: &Spool, wanted: &str) -> Vec<Found> {
    let mut found = Vec::new();
    let is_wanted = |path: &[u8]| path == wanted.as_bytes();
    spool
        .find(&is_wanted, &mut |it| {
            found.push(it.clone());
            Ok(())
        })
        .unwrap();
    found
}

#[test]
fn the_files_are_those_of_the_document() {
    let (_dir, base) = place();
    let spool = spool(&base);
    let root = spool.root().to_path_buf();
    fs::write(base.join("five"), "12345").unwrap();
    let drive = spool.drive(None).unwrap();
    assert_eq!(fs::read_link(root.join("drive/default")).unwrap(), Path::new("d0"));
    assert_eq!(drive.device().unwrap(), Path::new("/dev/nst0"));
    let properties = fields(&[("root", base.to_str().unwrap()), ("comment", "a b")]);
    let job = spool.create_job(A, JobKind::Write, 1_455_999_000, &properties).unwrap();
    let mut job = spool.take_job(job.uuid()).unwrap();
    let comment = fields(&[("comment", "metadata and last data segment")]);
    job.add_batch(1_455_999_395, &comment, names(&["five", "none", "%odd"])).unwrap();
    job.add_batch(1_455_999_396, &Fields::default(), names(&["five"])).unwrap();
    let dir = root.join("job").join(A);
    let head = format!(
        "%job\njob {A}\nroot {}\ncomment a b\ncreated 1455999000\ntype w\n\n",
        base.display()
    );
    let batches = "%batches\n0 count 3 size 5\n1 count 1 size 5\n";
    assert_eq!(text(dir.join("wjob")), format!("{head}{batches}"));
    let batch = "%batch\nnumber 0\nadded 1455999395\ncount 3\nsize 5\n\
                 comment metadata and last data segment\n\n%files\nfive\nnone\n%odd\n";
    assert_eq!(text(dir.join("b0")), batch);
    assert!(job.member_name(0).ends_with(format!("/job/{A}/@0").as_bytes()));
    assert_eq!(job.status().unwrap(), None);
    drop(job);

    spool.queue(&drive, None).unwrap().add(A).unwrap();
    assert!(dir.join("@ready").exists());
    let link = root.join("drive/d0/queue").join(A);
    assert_eq!(fs::canonicalize(&link).unwrap(), dir);
    let tape = spool.add_tape(&Label::new("T3").unwrap()).unwrap();
    assert_eq!(text(root.join("tape/T3/label")), "t0version:1\nlabel:T3\n");
    assert!(root.join("tape/T3/@offline").exists());
    let taken = drive.take().unwrap();
    assert!(root.join("drive/d0/@busy").exists());
    taken.load(&tape).unwrap();
    assert_eq!(fs::read_link(root.join("drive/d0/tape")).unwrap(), Path::new("../../tape/T3"));
    assert!(root.join("tape/T3/@busy").exists());
    drop(taken);
    assert!(root.join("drive/d0/@idle").exists() && root.join("tape/T3/@loaded").exists());

    write_all(&spool, A, "T3", 1).unwrap();
    assert!(!link.exists() && !dir.exists());
    let dir = root.join("job/archive").join(A);
    let results = "\n%summary\nbegin 100\nend 200\ntape T3\nfilenum 1\nerrors 1\n\n\
                   %results\nfail 2 five\nok 300 none\nok 400 %odd\n";
    assert_eq!(text(dir.join("w0")), format!("{batch}{results}"));
    assert_eq!(text(root.join("tape/T3/log")), format!("1 10 {A} 0\n2 20 {A} 1\n"));
    let mut left: Vec<_> = fs::read_dir(&dir).unwrap().map(|it| it.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, [".lock", "@done", "log", "w0", "w1", "wjob"]);

    let receipts = base.join("receipts");
    let job = spool.job(A).unwrap();
    for id in job.batches().unwrap() {
        let name = format!("{A}/{}", id.number);
        receipt::append(&receipts, &name, &mut || job.batch(id)).unwrap();
        // Once more, as after a crash.
        receipt::append(&receipts, &name, &mut || job.batch(id)).unwrap();
    }
    let first = format!(
        "%receipt\nbatch {A}/0\nfiles 3\nbegin 100\nend 200\ntape T3\nfilenum 1\nerrors 1\n\
         fail five\nok 300 none\nok 400 %odd\n\n"
    );
    let second = format!(
        "%receipt\nbatch {A}/1\nfiles 1\nbegin 100\nend 200\ntape T3\nfilenum 2\nerrors 1\n\
         fail five\n\n"
    );
    assert_eq!(text(&receipts), first + &second);

    let found = find(&spool, base.join("none").to_str().unwrap());
    let [it] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&*it.tape, it.filenum, it.batch, it.position), (&b"T3"[..], 1, 0, 300));
    assert_eq!(find(&spool, base.join("five").to_str().unwrap()), []);
}

/// A tree as the original program leaves it, also where it was killed.
fn original(root: &Path) {
    for dir in ["drive/x/queue", "job/archive", "pool/full", "tape/T 1/@loaded", "drive/x/@busy"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    symlink("x", root.join("drive/default")).unwrap();
    symlink("/dev/nst1", root.join("drive/x/device")).unwrap();
    symlink("../../tape/T 1", root.join("drive/x/tape")).unwrap();
    let label = "t0version:1\nlabel:T 1\ncreated:1455999395\nowner:me\n";
    fs::write(root.join("tape/T 1/label"), label).unwrap();
    fs::write(root.join("tape/T 1/metrics"), "blocksize 32768\nmaxblocks 70000000\n").unwrap();
    fs::write(root.join("tape/T 1/log"), format!("1 2 {A} 0\n2 90 {A} 1\n3 ")).unwrap();
    let dir = root.join("job").join(A);
    fs::create_dir_all(dir.join("@busy")).unwrap();
    symlink(&dir, root.join("drive/x/queue").join(A)).unwrap();
    fs::write(
        dir.join("wjob"),
        format!(
            "%job\njob {A}\ncreated 1455990000\nroot /home\ntype w\n\n%batches\n\
             0 count 2 size 10\n1 count 1 size 5\n2 count 1 size 5\n"
        ),
    )
    .unwrap();
    let batch = |n: u64, files: &str| {
        format!("%batch\nnumber {n}\ncreated 1455999395\nsize 10\ncount 2\n\n%files\n{files}\n\n")
    };
    fs::write(dir.join("w0"), batch(0, "a/one\nmissing")).unwrap();
    fs::write(dir.join("@1"), batch(1, "two")).unwrap();
    fs::write(dir.join("b2"), batch(2, "/three")).unwrap();
    let own = format!("{}/@0", dir.display());
    fs::write(
        dir.join("log"),
        format!(
            "J {A} begin 1456000000\nT T 1 filenum 1 position 2\nB 0 begin 1456000001 files 4\n\
             F 0 {own}\n* afio: something\nF 900 a/one\nE missing\nB 0 end 1456000100 errors 1\n\
             T T 1 filenum 2 position 90\nB 1 begin 1456000101 files 3\nF 900 tw"
        ),
    )
    .unwrap();
}

#[test]
fn a_spool_of_the_original_program_opens_and_its_interrupted_job_goes_on() {
    let (_dir, base) = place();
    original(&base);
    let spool = Spool::open(&base).unwrap();
    let drive = spool.drive(None).unwrap();
    assert_eq!((drive.name(), drive.device().unwrap()), (OsStr::new("x"), "/dev/nst1".into()));
    // Its worker is not there any more.
    assert!(drive.dir().join("@busy").exists());
    assert_eq!(drive.status().unwrap(), DriveStatus::Idle);
    let tape = drive.tape().unwrap().unwrap();
    assert_eq!(tape.name(), b"T 1");
    assert_eq!(tape.label().unwrap().unwrap().get(b"owner"), Some(&b"me"[..]));
    assert_eq!(tape.metrics().unwrap().number("maxblocks"), Some(70_000_000u64));
    let mut files = Vec::new();
    tape.files(&mut |it| {
        files.push((it.filenum, it.position, it.batch));
        Ok(())
    })
    .unwrap();
    assert_eq!(files, [(1, 2, 0), (2, 90, 1)]);
    assert_eq!(spool.jobs(false).unwrap(), [A]);
    let found = find(&spool, "/home/a/one");
    let [it] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&*it.tape, it.filenum, it.batch, it.position), (&b"T 1"[..], 1, 0, 900));
    assert_eq!(find(&spool, "/home/tw"), [], "half a line");
    assert_eq!(find(&spool, &format!("{}/job/{A}/@0", base.display())), []);

    let queue = spool.queue(&drive, None).unwrap();
    assert_eq!(queue.list().unwrap(), [A]);
    let job = queue.next(JobKind::Write).unwrap().unwrap();
    assert_eq!(job.status().unwrap(), Some(JobStatus::Ready), "its worker has died");
    assert_eq!(job.pending().unwrap().iter().map(|it| it.number).collect::<Vec<_>>(), [1, 2]);
    let mut batch = job.batch(job.pending().unwrap()[0]).unwrap();
    assert_eq!(batch.next_file().unwrap(), Some(&b"two"[..]));
    assert_eq!(batch.next_file().unwrap(), None);
    assert_eq!(batch.summary().unwrap(), None);
    assert_eq!(job.root(), Some(&b"/home"[..]));
    drop(job);
    write_all(&spool, A, "T 1", 3).unwrap();
    let log = text(base.join("job/archive").join(A).join("log"));
    assert!(log.contains("files 3\nJ "), "the half line is gone: {log}");
    let text = text(base.join("job/archive").join(A).join("w1"));
    assert!(text.contains("created 1455999395\n") && text.contains("\n%results\nfail 2 two\n"));
}

#[test]
fn a_job_goes_through_its_life() {
    let (_dir, base) = place();
    let spool = spool(&base);
    let drive = spool.drive(Some(OsStr::new("d0"))).unwrap();
    let queue = spool.queue(&drive, None).unwrap();
    spool.create_job(A, JobKind::Write, 1, &Fields::default()).unwrap();
    assert_eq!(queue.add(A).unwrap_err().kind(), ErrorKind::Usage, "it has no batch");
    let mut job = spool.take_job(A).unwrap();
    for bad in [&["relative"][..], &[""], &["/a\nb"], &[]] {
        let kind = job.add_batch(1, &Fields::default(), names(bad)).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::Usage, "{bad:?}");
    }
    job.add_batch(1, &Fields::default(), names(&["/x", "/y"])).unwrap();
    job.set("receipt", b"/tmp/receipts").unwrap();
    assert!(job.set("job", B.as_bytes()).is_err());
    assert_eq!(spool.take_job(A).unwrap_err().kind(), ErrorKind::Locked);
    drop(job);
    queue.add(A).unwrap();
    queue.add(A).unwrap();
    let other = spool.queue(&drive, Some(OsStr::new("night"))).unwrap();
    spool.clone_job(A, B, 2).unwrap();
    assert_eq!(spool.job(A).unwrap().status().unwrap(), Some(JobStatus::Cloned));
    assert_eq!(queue.list().unwrap(), [""; 0]);
    let clone = spool.job(B).unwrap();
    assert_eq!(clone.fields().get("cloned-from"), Some(A.as_bytes()));
    assert_eq!(clone.fields().get("receipt"), Some(&b"/tmp/receipts"[..]));
    assert_eq!(clone.pending().unwrap().len(), 1);
    let lines = text(clone.path());
    assert!(lines.ends_with("%batches\n0 count 2 size 0\n"), "{lines}");
    other.add(B).unwrap();
    assert!(spool.is_queued(B).unwrap());
    assert_eq!(
        fs::canonicalize(spool.root().join("drive/d0/queue/night").join(B)).unwrap(),
        *clone.dir()
    );
    spool.revoke(B).unwrap();
    spool.revoke(B).unwrap();
    assert!(!spool.is_queued(B).unwrap());
    assert_eq!(spool.job(B).unwrap().status().unwrap(), Some(JobStatus::Revoked));
    assert_eq!(other.add(B).unwrap_err().kind(), ErrorKind::Usage);
    spool.redo(B).unwrap();
    other.add(B).unwrap();
    spool.add_tape(&Label::new("T").unwrap()).unwrap();
    write_all(&spool, B, "T", 1).unwrap();
    assert_eq!(spool.jobs(false).unwrap(), [A]);
    assert_eq!(spool.jobs(true).unwrap(), [A, B]);
    assert_eq!(spool.job(B).unwrap().status().unwrap(), Some(JobStatus::Done));
    assert_eq!(find(&spool, "/y").len(), 1);
    assert_eq!(spool.revoke(B).unwrap_err().kind(), ErrorKind::Usage);
    // Done again: what was is in the log only.
    spool.redo(B).unwrap();
    assert!(!spool.job(B).unwrap().is_archived());
    let pending = text(spool.job(B).unwrap().dir().join("b0"));
    assert!(pending.ends_with("%files\n/x\n/y\n"), "{pending}");
    write_all(&spool, B, "T", 2).unwrap();
    let found: Vec<u64> = find(&spool, "/y").iter().map(|it| it.filenum).collect();
    assert_eq!(found, [2]);
    assert_eq!(spool.job(C).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(spool.job("../job").unwrap_err().kind(), ErrorKind::Usage);
    assert!(spool.create_job(A, JobKind::Write, 1, &Fields::default()).is_err());
}

#[test]
fn what_was_written_can_be_read_back_beside_its_results() {
    let (_dir, base) = place();
    let spool = spool(&base);
    spool.create_job(A, JobKind::Write, 1, &Fields::default()).unwrap();
    spool.take_job(A).unwrap().add_batch(1, &Fields::default(), names(&["/x", "/y"])).unwrap();
    spool.add_tape(&Label::new("T").unwrap()).unwrap();
    write_all(&spool, A, "T", 1).unwrap();
    let mut job = spool.take_job(A).unwrap();
    let id = job.batches().unwrap()[0];
    let mut results = job.begin_results().unwrap();
    results.ok(300, b"/y").unwrap();
    results.note("mtime", b"/y").unwrap();
    assert!(results.ok(1, b"a\nb").is_err());
    let summary = Summary { begin: 300, end: 400, tape: b"T".to_vec(), filenum: 1 };
    let id = job.complete(id, results, &summary, BatchStatus::Read).unwrap();
    assert_eq!((id.status, job.batches().unwrap()), (BatchStatus::Read, vec![id]));
    let written = text(job.dir().join("r0"));
    let end = "%results\nfail 2 /x\nok 300 /y\n\n%read-summary\nbegin 300\nend 400\ntape T\n\
               filenum 1\nerrors 0\nnotes 1\n\n%read-results\nok 300 /y\nnote mtime /y\n";
    assert!(written.ends_with(end), "{written}");
    let mut batch = job.batch(id).unwrap();
    assert_eq!(batch.summary().unwrap().unwrap().number("begin"), Some(100u64));
    assert_eq!(batch.next_result().unwrap(), Some(Outcome::Fail(2, b"/x")));
    assert_eq!(batch.next_result().unwrap(), Some(Outcome::Ok(300, b"/y")));
    assert_eq!(batch.next_result().unwrap(), None);
}

#[test]
fn what_is_not_known_is_kept() {
    let (_dir, base) = place();
    let spool = spool(&base);
    spool.create_job(A, JobKind::Write, 1, &Fields::default()).unwrap();
    let path = spool.job(A).unwrap().path();
    let strange = format!(
        "%job\n# a remark\njob {A}\nkey\nkey2 \nx \u{fc} 1 \n\n%extra\none\n%two\n\n%batches\n\
         7 count 1 size 2 more 3\n\n\n%last\n"
    );
    fs::write(&path, &strange).unwrap();
    let mut job = spool.take_job(A).unwrap();
    assert_eq!(job.fields().get("key"), Some(&b""[..]));
    assert_eq!(job.fields().get("x"), Some("\u{fc} 1 ".as_bytes()));
    let id = job.add_batch(1, &Fields::default(), names(&["/x"])).unwrap();
    assert_eq!(id.number, 8);
    let expected = format!(
        "%job\n# a remark\njob {A}\nkey\nkey2 \nx \u{fc} 1 \n\n%batches\n7 count 1 size 2 more 3\n\
         8 count 1 size 0\n\n%extra\none\n%two\n\n%last\n"
    );
    assert_eq!(text(&path), expected);
    let batch = job.dir().join("b8");
    let strange = "%batch\nnumber 8\n\n%files\n/x\n\n%notes\nfree text\n";
    fs::write(&batch, strange).unwrap();
    let results = job.begin_results().unwrap();
    let summary = Summary { begin: 1, end: 2, tape: b"T".to_vec(), filenum: 1 };
    job.complete(id, results, &summary, BatchStatus::Written).unwrap();
    let written = text(job.dir().join("w8"));
    assert!(written.starts_with(strange) && written.ends_with("\n%results\n"), "{written}");
}

#[test]
fn receipts_are_read_in_both_forms() {
    let input =
        b"begin 1\nok 5 a b\nfail c\nbatch x\nok 9 d\n\n\n%job\njob x\n\n%log\nJ x begin 1\n\n\
                  %receipt\nfiles 2\nok 1 a\n\nfail 13 e";
    let mut receipts = Receipts::new(&input[..]);
    let mut found = Vec::new();
    while let Some(part) = receipts.next_part().unwrap() {
        found.push(format!("{part:?}").replace(", ", " "));
    }
    let field = |key: &str, value: &str| {
        format!("{:?}", Receipt::Field(key.as_bytes(), value.as_bytes())).replace(", ", " ")
    };
    let ok = |at, path: &str| format!("{:?}", Receipt::Ok(at, path.as_bytes())).replace(", ", " ");
    let fail = |path: &str| format!("{:?}", Receipt::Fail(path.as_bytes())).replace(", ", " ");
    let end = |is_whole| format!("{:?}", Receipt::End { is_whole }).replace(", ", " ");
    let expected = [
        "Begin".to_owned(),
        field("begin", "1"),
        ok(5, "a b"),
        fail("c"),
        field("batch", "x"),
        ok(9, "d"),
        end(None),
        "Begin".to_owned(),
        field("files", "2"),
        ok(1, "a"),
        end(Some(false)),
        "Begin".to_owned(),
        fail("13 e"),
        end(None),
    ];
    assert_eq!(found, expected);
    for bad in ["ok\n", "ok x y\n", "ok 1\n", "fail\n"] {
        let mut receipts = Receipts::new(bad.as_bytes());
        receipts.next_part().unwrap();
        assert_eq!(receipts.next_part().unwrap_err().kind(), ErrorKind::Corrupt, "{bad}");
    }
}

#[test]
fn tapes_have_any_label_and_are_moved() {
    let (_dir, base) = place();
    let spool = spool(&base);
    let labels: [&[u8]; 6] = [b"T0", b"a/b", b"..", b"100%", b"\xff \xfe", b".new"];
    for label in labels {
        let tape = spool.add_tape(&Label::new(label).unwrap()).unwrap();
        assert_eq!(tape.dir().parent().unwrap(), spool.root().join("tape"));
        assert_eq!(spool.tape(label).unwrap().unwrap().name(), label);
    }
    let found: BTreeSet<Vec<u8>> = spool.tapes().unwrap().iter().map(|it| it.name()).collect();
    assert_eq!(found, labels.iter().map(|it| it.to_vec()).collect());
    assert!(spool.add_tape(&Label::new(vec![b'x'; 256]).unwrap()).is_err());
    assert!(spool.tape(b"none").unwrap().is_none());
    // As the original program names it.
    fs::create_dir(spool.root().join("tape/50%")).unwrap();
    assert_eq!(spool.tape(b"50%").unwrap().unwrap().name(), b"50%");

    let tape = spool.tape(b"T0").unwrap().unwrap();
    tape.move_offsite(true).unwrap();
    assert_eq!(tape.status().unwrap(), TapeStatus::Offsite);
    assert!(tape.dir().join("@offsite").exists() && !tape.dir().join("@offline").exists());
    tape.move_offsite(false).unwrap();
    let drive = spool.drive(None).unwrap();
    let taken = drive.take().unwrap();
    assert_eq!(drive.take().map(|_| ()).unwrap_err().kind(), ErrorKind::Locked);
    taken.load(&tape).unwrap();
    assert_eq!(tape.status().unwrap(), TapeStatus::Busy);
    assert_eq!(tape.move_offsite(true).unwrap_err().kind(), ErrorKind::Locked);
    taken.load(&spool.tape(b"a/b").unwrap().unwrap()).unwrap();
    assert_eq!(tape.status().unwrap(), TapeStatus::Offline);
    taken.unload().unwrap();
    drop(taken);
    assert!(drive.tape().unwrap().is_none());
    let mut metrics = tape.metrics().unwrap();
    metrics.set("blocksize", "32768").unwrap();
    tape.set_metrics(&metrics).unwrap();
    assert_eq!(text(tape.dir().join("metrics")), "blocksize 32768\n");
    assert_eq!(tape.metrics().unwrap(), metrics);

    assert_eq!(spool.pools().unwrap(), [&b"any"[..], b"full", b"incr"]);
    assert_eq!(spool.pool(b"any").unwrap().len(), 7);
    spool.set_in_pool(b"full", b"T0", true).unwrap();
    spool.set_in_pool(b"full", b"a/b", true).unwrap();
    spool.set_in_pool(b"full", b"T0", true).unwrap();
    assert_eq!(spool.pool(b"full").unwrap(), [&b"a/b"[..], b"T0"]);
    spool.set_in_pool(b"full", b"a/b", false).unwrap();
    assert_eq!(text(spool.root().join("pool/full")), "T0\n");
    assert_eq!(spool.pool(b"none").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(spool.pool(b"../job").unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn jobs_leave_a_queue_in_the_order_in_which_they_came() {
    let (_dir, base) = place();
    let spool = spool(&base);
    let queue = spool.queue(&spool.drive(None).unwrap(), None).unwrap();
    for uuid in [C, A, B] {
        spool.create_job(uuid, JobKind::Write, 1, &Fields::default()).unwrap();
        spool.take_job(uuid).unwrap().add_batch(1, &Fields::default(), names(&["/x"])).unwrap();
        queue.add(uuid).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(queue.list().unwrap(), [C, A, B]);
    let first = queue.next(JobKind::Write).unwrap().unwrap();
    let second = queue.next(JobKind::Write).unwrap().unwrap();
    assert_eq!((first.uuid(), second.uuid()), (C, A));
    assert!(queue.next(JobKind::Read).unwrap().is_none());
    drop((first, second));
    // Somebody has removed a job by hand.
    fs::remove_dir_all(spool.root().join("job").join(C)).unwrap();
    assert_eq!(queue.next(JobKind::Write).unwrap().unwrap().uuid(), A);
}

#[test]
fn many_at_once_make_jobs_and_take_each_of_them_once() {
    let (_dir, base) = place();
    let spool = spool(&base);
    let queue = spool.queue(&spool.drive(None).unwrap(), None).unwrap();
    let uuid = |n: usize| format!("00000000-0000-0000-0000-{n:012}");
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (spool, queue) = (&spool, &queue);
            scope.spawn(move || {
                for n in (thread * 5)..(thread * 5 + 5) {
                    let uuid = uuid(n);
                    spool.create_job(&uuid, JobKind::Write, 1, &Fields::default()).unwrap();
                    let mut job = spool.take_job(&uuid).unwrap();
                    job.add_batch(1, &Fields::default(), names(&["/x"])).unwrap();
                    drop(job);
                    queue.add(&uuid).unwrap();
                }
            });
        }
    });
    assert_eq!(queue.list().unwrap().len(), 40);
    spool.add_tape(&Label::new("T").unwrap()).unwrap();
    let taken = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(mut job) = queue.next(JobKind::Write).unwrap() {
                    taken.lock().unwrap().push(job.uuid().to_owned());
                    job.set_status(Some(JobStatus::Busy)).unwrap();
                    let id = job.pending().unwrap()[0];
                    let results = job.begin_results().unwrap();
                    let summary = Summary { begin: 1, end: 2, tape: b"T".to_vec(), filenum: 1 };
                    job.complete(id, results, &summary, BatchStatus::Written).unwrap();
                    spool.finish(job).unwrap();
                }
            });
        }
    });
    let mut taken = taken.into_inner().unwrap();
    taken.sort();
    assert_eq!(taken, (0..40).map(uuid).collect::<Vec<_>>());
}

#[test]
fn damaged_files_are_named_and_never_a_panic() {
    let (_dir, base) = place();
    let spool = spool(&base);
    spool.create_job(A, JobKind::Write, 1, &Fields::default()).unwrap();
    let mut job = spool.take_job(A).unwrap();
    let id = job.add_batch(1, &Fields::default(), names(&["/x"])).unwrap();
    drop(job);
    let job = spool.job(A).unwrap();
    let long = vec![b'x'; 70_000];
    for bad in [&b""[..], b"x", b"%job", b"%batch", b"%batch\n\nx\n", b"\0", &long] {
        fs::write(job.dir().join("b0"), bad).unwrap();
        let error = job.batch(id).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("b0"), "{error}");
    }
    for bad in ["", "%batches\n", "job x\n"] {
        fs::write(job.path(), bad).unwrap();
        assert_eq!(spool.job(A).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    fs::remove_file(job.path()).unwrap();
    symlink("/dev/zero", job.path()).unwrap();
    assert!(spool.job(A).is_err());
    fs::remove_file(job.path()).unwrap();
    let made = std::process::Command::new("mkfifo").arg(job.path()).status().unwrap();
    assert!(made.success());
    assert_eq!(spool.job(A).unwrap_err().kind(), ErrorKind::Corrupt);
    let tape = spool.add_tape(&Label::new("T").unwrap()).unwrap();
    fs::write(tape.dir().join("log"), b"1 2\nx\n\xff\n1 2 j 3\n9 9 9 9").unwrap();
    let mut files = 0;
    tape.files(&mut |_| {
        files += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(files, 1);
}

#[test]
fn a_list_of_files_is_never_in_memory_and_no_line_is_too_long() {
    let (_dir, base) = place();
    let spool = spool(&base);
    spool.create_job(A, JobKind::Write, 1, &fields(&[("root", "/nowhere")])).unwrap();
    let mut job = spool.take_job(A).unwrap();
    let count = 300_000u64;
    let id = job
        .add_batch(1, &Fields::default(), (0..count).map(|it| Ok(format!("f{it}").into_bytes())))
        .unwrap();
    let mut batch = job.batch(id).unwrap();
    let mut results = job.begin_results().unwrap();
    let mut files = 0;
    while let Some(name) = batch.next_file().unwrap() {
        results.ok(files, name).unwrap();
        files += 1;
    }
    assert_eq!((files, batch.fields().number("count")), (count, Some(count)));
    let summary = Summary { begin: 1, end: 2, tape: b"T".to_vec(), filenum: 1 };
    let id = job.complete(id, results, &summary, BatchStatus::Written).unwrap();
    let mut batch = job.batch(id).unwrap();
    let mut results = 0;
    while batch.next_result().unwrap().is_some() {
        results += 1;
    }
    assert_eq!(results, count);
    let too_long = vec![b'x'; 70_000];
    assert!(job.add_batch(1, &Fields::default(), std::iter::once(Ok(too_long))).is_err());
}

/// What is known of a spool by its files alone.
fn states(spool: &Spool) -> (Option<JobStatus>, Vec<String>, bool) {
    let job = spool.job(A).unwrap();
    let batches = job.batches().unwrap().iter().map(|it| it.file_name()).collect();
    (job.status().unwrap(), batches, spool.is_queued(A).unwrap())
}

/// Does something to a spool on a disk that remembers all its states, and looks at what a kill or a
/// power cut after each operation leaves: it opens, nothing is half, and the same can be done then.
fn interrupt_everywhere(
    prepare: &dyn Fn(&Spool),
    work: &dyn Fn(&Spool) -> Result<()>,
    again: &dyn Fn(&Spool) -> Result<()>,
    check: &dyn Fn(&Spool),
) {
    let (_dir, base) = place();
    let seed = spool(&base);
    prepare(&seed);
    let image = Image::of_dir(seed.root());
    let fault = FaultFs::new(&base.join("fs"));
    let mut disk = Disk::new(&image, Rules::default());
    disk.record();
    let (path, disk) = fault.put("t0p", disk);
    work(&Spool::open(&path).unwrap()).unwrap();
    let moments = disk.lock().unwrap().moments.take().unwrap();
    assert!(moments.len() > 5, "{}", moments.len());
    let last = moments.len() - 1;
    let mut seen = BTreeSet::new();
    let mut look = |image: Image, at: &str, redo: bool| {
        if !seen.insert((image.digest(), redo)) {
            return;
        }
        let dir = base.join("after");
        image.write_to(&dir);
        let spool = Spool::open(&dir).unwrap_or_else(|e| panic!("{at}: {e}"));
        if redo {
            again(&spool).unwrap_or_else(|e| panic!("{at}: {e}"));
        }
        check(&spool);
        let left = left_behind(&dir);
        assert!(left.is_empty(), "{at}: {left:?}");
        fs::remove_dir_all(&dir).unwrap();
    };
    for (number, moment) in moments.iter().enumerate() {
        let at = format!("after {number} ({:?} {})", moment.op, moment.what);
        let cuts = [Cut::Kept, Cut::Lost, Cut::Empty, Cut::Nameless];
        let seeds = (0..3).map(|it| Cut::Some(number as u64 * 3 + it));
        for cut in cuts.into_iter().chain(seeds) {
            // What was said to be done lasts, and is not done twice.
            look(moment.cut(cut), &format!("{cut:?} {at}"), number < last);
        }
        if number < last {
            // Killed; the next one says that it is done; then the power fails.
            let (path, disk) = fault.put("t0p", Disk::resume(moment));
            again(&Spool::open(&path).unwrap()).unwrap_or_else(|e| panic!("{at}: {e}"));
            let done = disk.lock().unwrap().moment(None, String::new());
            for cut in [Cut::Lost, Cut::Some(number as u64)] {
                look(done.cut(cut), &format!("{at}, then done, then {cut:?}"), false);
            }
        }
    }
}

/// Files that were being written.
fn left_behind(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().as_bytes().ends_with(b".new") {
            found.push(entry.path());
        } else if entry.file_type().unwrap().is_dir() {
            found.extend(left_behind(&entry.path()));
        }
    }
    found
}

fn make_job(spool: &Spool) -> Result<()> {
    match spool.job(A) {
        // Who is told that it is there may rely on it.
        Ok(_) => spool.take_job(A).map(|_| ()),
        Err(_) => spool.create_job(A, JobKind::Write, 1, &Fields::default()).map(|_| ()),
    }
}

fn add_batch(spool: &Spool) -> Result<()> {
    let mut job = spool.take_job(A)?;
    match job.batches()?.len() {
        0 => job.add_batch(1, &Fields::default(), names(&["/x", "/y"])).map(|_| ()),
        _ => Ok(()),
    }
}

fn enqueue(spool: &Spool) -> Result<()> {
    spool.queue(&spool.drive(None)?, None)?.add(A)
}

fn write_job(spool: &Spool) -> Result<()> {
    let job = spool.take_job(A)?;
    match job.pending()?.is_empty() {
        // All batches are there: only the end of the job is missing.
        true => spool.finish(job),
        false => {
            drop(job);
            write_all(spool, A, "T", 1)
        }
    }
}

fn prepared(steps: &[fn(&Spool) -> Result<()>]) -> impl Fn(&Spool) {
    move |spool| {
        spool.add_tape(&Label::new("T").unwrap()).unwrap();
        steps.iter().for_each(|it| it(spool).unwrap());
    }
}

#[test]
fn a_job_that_was_being_made_is_there_whole_or_not_at_all() {
    interrupt_everywhere(&prepared(&[]), &make_job, &make_job, &|spool| {
        assert_eq!(states(spool), (None, vec![], false));
        let end = format!("%job\njob {A}\ncreated 1\ntype w\n\n%batches\n");
        assert_eq!(text(spool.job(A).unwrap().path()), end);
    });
}

#[test]
fn a_batch_that_was_being_added_is_there_whole_or_not_at_all() {
    interrupt_everywhere(&prepared(&[make_job]), &add_batch, &add_batch, &|spool| {
        drop(spool.take_job(A).unwrap());
        assert_eq!(states(spool), (None, vec!["b0".to_owned()], false));
        let job = spool.job(A).unwrap();
        assert!(text(job.path()).ends_with("%batches\n0 count 2 size 0\n"));
        assert!(text(job.dir().join("b0")).ends_with("%files\n/x\n/y\n"));
    });
}

#[test]
fn a_job_that_was_being_queued_can_be_queued() {
    interrupt_everywhere(&prepared(&[make_job, add_batch]), &enqueue, &enqueue, &|spool| {
        let expected = (Some(JobStatus::Ready), vec!["b0".to_owned()], true);
        assert_eq!(states(spool), expected);
        let queue = spool.queue(&spool.drive(None).unwrap(), None).unwrap();
        assert!(queue.next(JobKind::Write).unwrap().is_some());
    });
}

#[test]
fn a_job_that_was_being_written_goes_on() {
    let prepare = prepared(&[make_job, add_batch, enqueue]);
    interrupt_everywhere(&prepare, &write_job, &write_job, &|spool| {
        drop(spool.take_job(A).unwrap());
        assert_eq!(states(spool), (Some(JobStatus::Done), vec!["w0".to_owned()], false));
        assert!(spool.job(A).unwrap().is_archived());
        let written = text(spool.job(A).unwrap().dir().join("w0"));
        assert!(written.ends_with("%results\nfail 2 /x\nok 300 /y\n"), "{written}");
        let found = find(spool, "/y");
        assert_eq!(found.len(), 1, "{found:?}");
        // The tape's log may say it twice, if the first was not known to be done.
        let log = text(spool.tape(b"T").unwrap().unwrap().dir().join("log"));
        assert!(log.lines().all(|it| it == format!("1 10 {A} 0")), "{log}");
    });
}

#[test]
fn a_job_that_was_being_redone_or_cloned_or_revoked_is_one_or_the_other() {
    let redo = |spool: &Spool| spool.redo(A);
    let prepare = prepared(&[make_job, add_batch, enqueue, write_job]);
    interrupt_everywhere(&prepare, &redo, &redo, &|spool| {
        assert_eq!(states(spool), (None, vec!["b0".to_owned()], false));
        assert!(!spool.job(A).unwrap().is_archived());
    });
    let revoke = |spool: &Spool| spool.revoke(A);
    let prepare = prepared(&[make_job, add_batch, enqueue]);
    interrupt_everywhere(&prepare, &revoke, &revoke, &|spool| {
        assert_eq!(states(spool), (Some(JobStatus::Revoked), vec!["b0".to_owned()], false));
    });
    // The new one is there whole before the old one says so; done again, it gets another name.
    let clone = |spool: &Spool| match spool.job(B) {
        Ok(_) => spool.clone_job(A, C, 2).map(|_| ()),
        Err(_) => spool.clone_job(A, B, 2).map(|_| ()),
    };
    let prepare = prepared(&[make_job, add_batch, enqueue]);
    interrupt_everywhere(&prepare, &clone, &clone, &|spool| {
        assert_eq!(states(spool), (Some(JobStatus::Cloned), vec!["b0".to_owned()], false));
        let new = spool.job(C).or_else(|_| spool.job(B)).unwrap();
        assert!(text(new.path()).ends_with("%batches\n0 count 2 size 0\n"));
        assert_eq!(new.pending().unwrap().len(), 1);
    });
}

#[test]
fn a_tape_that_was_being_noted_or_loaded_is_in_one_place() {
    let note = |spool: &Spool| spool.add_tape(&Label::new("New").unwrap()).map(|_| ());
    interrupt_everywhere(&prepared(&[]), &note, &note, &|spool| {
        let tape = spool.tape(b"New").unwrap().unwrap();
        assert_eq!(tape.status().unwrap(), TapeStatus::Offline);
        assert_eq!(tape.label().unwrap().unwrap().text(), b"New");
    });
    let load = |spool: &Spool| {
        let taken = spool.drive(None)?.take()?;
        taken.load(&spool.tape(b"T")?.unwrap())
    };
    interrupt_everywhere(&prepared(&[]), &load, &load, &|spool| {
        let drive = spool.drive(None).unwrap();
        drop(drive.take().unwrap());
        assert_eq!(drive.tape().unwrap().unwrap().name(), b"T");
        let tape = spool.tape(b"T").unwrap().unwrap();
        assert_eq!(tape.status().unwrap(), TapeStatus::Loaded);
        assert_eq!(drive.status().unwrap(), DriveStatus::Idle);
    });
}

/// A job whose batch has been written to a tape.
fn written_job(base: &Path) -> Job {
    let spool = spool(base);
    make_job(&spool).unwrap();
    add_batch(&spool).unwrap();
    spool.add_tape(&Label::new("T").unwrap()).unwrap();
    write_job(&spool).unwrap();
    spool.job(A).unwrap()
}

#[test]
fn a_receipt_that_was_cut_short_is_known_as_such_and_written_again() {
    let (_dir, base) = place();
    let job = written_job(&base);
    let append = |path: &Path| {
        receipt::append(path, "id", &mut || job.batch(job.batches().unwrap()[0])).unwrap();
    };
    let path = base.join("receipts");
    append(&path);
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        append(&path);
        let found = fs::read(&path).unwrap();
        // Without its last blank line it is whole all the same.
        let ends = found.ends_with(&whole) || found.ends_with(&whole[..whole.len() - 1]);
        assert!(ends, "{len}: {}", String::from_utf8_lossy(&found));
        let mut receipts = Receipts::new(&*found);
        let mut count = 0;
        loop {
            match receipts.next_part() {
                Ok(Some(Receipt::End { is_whole: Some(true) })) => count += 1,
                Ok(None) => break,
                _ => {}
            }
        }
        assert_eq!(count, 1, "{len}: {}", String::from_utf8_lossy(&found));
    }
    // What else is there stays.
    fs::write(&path, "by hand\n").unwrap();
    append(&path);
    assert_eq!(fs::read(&path).unwrap(), [b"by hand\n\n", &*whole].concat());
}

#[test]
fn receipts_that_are_written_at_once_stay_apart() {
    let (_dir, base) = place();
    let spool = spool(&base);
    make_job(&spool).unwrap();
    // Longer than what is written at once.
    let files = (0..3000).map(|it| Ok(format!("/{it:0>60}").into_bytes()));
    spool.take_job(A).unwrap().add_batch(1, &Fields::default(), files).unwrap();
    spool.add_tape(&Label::new("T").unwrap()).unwrap();
    write_all(&spool, A, "T", 1).unwrap();
    let (job, path) = (spool.job(A).unwrap(), base.join("receipts"));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (job, path) = (&job, &path);
            scope.spawn(move || {
                for number in 0..5 {
                    let mut open = || job.batch(job.batches().unwrap()[0]);
                    receipt::append(path, &format!("{thread}/{number}"), &mut open).unwrap();
                }
            });
        }
    });
    let mut receipts = Receipts::new(std::io::BufReader::new(fs::File::open(&path).unwrap()));
    let mut count = 0;
    while let Some(part) = receipts.next_part().unwrap() {
        if let Receipt::End { is_whole } = part {
            assert_eq!(is_whole, Some(true));
            count += 1;
        }
    }
    assert_eq!(count, 20);
}

#[test]
fn a_batch_of_another_program_is_split_as_it_is() {
    let (_dir, base) = place();
    let spool = spool(&base);
    spool.create_job(A, JobKind::Write, 1, &Fields::default()).unwrap();
    let mut job = spool.take_job(A).unwrap();
    let id = job.add_batch(1, &Fields::default(), names(&["/a", "/b", "/c"])).unwrap();
    let path = base.join("t0p/job").join(A).join("b0");
    let own = text(&path).replace("\n\n%files", "\nby\thand one\n two\n\n%files");
    fs::write(&path, own.replace("/b\n", "b\n")).unwrap();
    let rest = job.split(id, 1, 2).unwrap();
    let path = base.join("t0p/job").join(A).join(rest.file_name());
    let found = text(&path);
    assert!(found.contains("\nby\thand one\n two\ncomment continues 0\n"), "{found}");
    assert!(found.contains("\n%files\nb\n/c\n"), "{found}");
    assert_eq!(job.pending().unwrap().len(), 2);
}

#[test]
fn a_lock_goes_with_who_has_it() {
    let (_dir, base) = place();
    let lock = Lock::take(&base).unwrap();
    let error = Lock::take(&base).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
    assert!(Lock::is_held(&base).unwrap());
    drop(lock);
    assert!(!Lock::is_held(&base).unwrap());
    Lock::take(&base).unwrap();
    let mut log = raidtape::tape::spool::log::LogWriter::open(&base.join("log")).unwrap();
    log.put(b"line").unwrap();
    log.sync().unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(base.join("log")).unwrap();
    file.write_all(&[b'x'; 200_000]).unwrap();
    raidtape::tape::spool::log::LogWriter::open(&base.join("log")).unwrap();
    assert_eq!(text(base.join("log")), "line\n");
}

#[test]
fn a_batch_that_says_a_wrong_count_gets_one_receipt() {
    let (_dir, base) = place();
    let job = written_job(&base);
    let id = job.batches().unwrap()[0];
    let path = job.batch_path(id).unwrap();
    let batch = text(&path);
    let count = batch.lines().find(|it| it.starts_with("count ")).unwrap();
    fs::write(&path, batch.replace(&format!("\n{count}\n"), "\ncount 77\n")).unwrap();
    let receipts = base.join("receipts");
    for _ in 0..3 {
        receipt::append(&receipts, "id", &mut || job.batch(id)).unwrap();
    }
    let said = text(&receipts);
    assert_eq!(said.matches("%receipt\n").count(), 1, "{said}");
    assert!(said.contains(&format!("\n{}\n", count.replace("count", "files"))), "{said}");
}
