//! `t0watch` says everything that is added to the logs of a drive's jobs, and says it once.

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;
use raidtape::tape::label::Label;
use raidtape::tape::spool::batch::{BatchStatus, Summary};
use raidtape::tape::spool::drive::TakenDrive;
use raidtape::tape::spool::job::{JobStatus, OpenJob};
use raidtape::tape::spool::log::TapeFile;

use crate::common::verbs::Place;
use crate::common::wait_for;

/// A process that does not outlive its test.
struct Watch(Child);

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A job with batches of one file, taken and begun.
fn begin(place: &Place, batches: usize) -> OpenJob {
    let job = place.ok(&["t0job", "-c"]);
    for _ in 0..batches {
        place.ok(&["t0job", "-a", &job, "/etc/passwd"]);
    }
    let mut job = place.spool().take_job(&job).unwrap();
    job.set_status(Some(JobStatus::Busy)).unwrap();
    put(&job, &[format!("J {} begin 1", job.uuid())]);
    job
}

fn put(job: &OpenJob, lines: &[String]) {
    let mut log = job.log().unwrap();
    lines.iter().for_each(|it| log.put(it.as_bytes()).unwrap());
    log.sync().unwrap();
}

/// Says that the next batch of a job is on a tape; gives the lines.
fn acknowledge(place: &Place, job: &mut OpenJob, tape: &str, filenum: u64) -> Vec<String> {
    let id = job.pending().unwrap()[0];
    let number = id.number;
    let lines = [
        format!("T {tape} filenum {filenum} position {}", filenum * 9),
        format!("B {number} begin 2 files 1"),
        "F 500 /etc/passwd".to_owned(),
        format!("B {number} end 3 errors 0"),
    ];
    put(job, &lines);
    let known = place.spool().tape(tape.as_bytes()).unwrap().unwrap();
    let file = TapeFile { filenum, position: filenum * 9, job: job.uuid().into(), batch: number };
    known.add_file(&file).unwrap();
    let mut results = job.begin_results().unwrap();
    results.ok(500, b"/etc/passwd").unwrap();
    let summary = Summary { begin: 2, end: 3, tape: tape.into(), filenum };
    job.complete(id, results, &summary, BatchStatus::Written).unwrap();
    lines.to_vec()
}

fn end(place: &Place, job: OpenJob) -> String {
    let line = format!("J {} end 4", job.uuid());
    put(&job, std::slice::from_ref(&line));
    place.spool().finish(job).unwrap();
    line
}

fn take(place: &Place, drive: &str, tape: &str) -> TakenDrive {
    let spool = place.spool();
    let tape = spool.add_tape(&Label::new(tape).unwrap()).unwrap();
    let taken = spool.drive(Some(drive.as_ref())).unwrap().take().unwrap();
    taken.load(&tape).unwrap();
    taken
}

#[test]
fn all_of_a_drive_is_said_and_nothing_of_another() {
    let place = Place::with_drive();
    place.ok(&["t0p", "init", "-d", "d1", place.base.join("other").to_str().unwrap()]);
    let (mine, other) = (take(&place, "d0", "T1"), take(&place, "d1", "T2"));
    let mut long = begin(&place, 2);
    let mut others = begin(&place, 2);
    // An earlier time of the same job is of no interest.
    put(&long, &["* before".to_owned(), format!("J {} begin 1", long.uuid())]);
    let mut wanted = vec![format!("J {} begin 1", long.uuid())];
    wanted.extend(acknowledge(&place, &mut long, "T1", 1));
    acknowledge(&place, &mut others, "T2", 1);
    let mut command = place.command(&["t0watch", "-d", "d0", "--interval", "0.1"]);
    let mut watch = Watch(command.stdout(Stdio::piped()).spawn().unwrap());
    let seen = Arc::new(Mutex::new(String::new()));
    let reader = std::thread::spawn({
        let (seen, mut output) = (seen.clone(), watch.0.stdout.take().unwrap());
        move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                seen.lock().push_str(std::str::from_utf8(&buffer[..len]).unwrap());
            }
        }
    });
    wait_for("the first batch", || seen.lock().contains("B 0 end"));
    // One that comes and goes between two looks.
    let mut short = begin(&place, 1);
    wanted.push(format!("J {} begin 1", short.uuid()));
    wanted.extend(acknowledge(&place, &mut short, "T1", 2));
    wanted.push(end(&place, short));
    wait_for("the short one", || seen.lock().contains(" end 4\n"));
    acknowledge(&place, &mut others, "T2", 2);
    wanted.extend(acknowledge(&place, &mut long, "T1", 3));
    wanted.push(end(&place, long));
    end(&place, others);
    drop((mine, other));
    assert!(watch.0.wait().unwrap().success());
    reader.join().unwrap();
    let seen = seen.lock().clone();
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!((lines[0], lines[lines.len() - 1]), ("busy T1", "idle T1"), "{seen}");
    assert_eq!(lines[1..lines.len() - 1], wanted, "{seen}");
    // What is over is not said to who comes later.
    assert_eq!(place.ok(&["t0watch"]), "idle T1");
}
