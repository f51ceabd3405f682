//! The writable tree of a mount, stored and cleared on a disk that stops at any operation.
//!
//! Invariant: what was synced there is there still, or it is in a run; never neither.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use super::scene::{Base, Contents, Scene, tell};
use crate::common::data::Seeded;
use crate::common::faultfs::disk::Disk;
use crate::common::faultfs::{Cut, Image, Moment, Rules};
use crate::common::mount::Clear;
use crate::common::{RAIDTAPE, wait_for};

const FILES: [&str; 4] = ["one", "two", "sub/three", "sub/deep/four"];

/// A store with a run, and files in its writable tree.
fn base(scene: &Scene) -> (Image, Contents) {
    let dir = scene.lay_out(&scene.base(Base::Run));
    let ingest = dir.join("c/catalog.ingest");
    let mut contents = Contents::new();
    for (number, name) in FILES.into_iter().enumerate() {
        let bytes = Seeded::new(number as u64).text(2_000);
        let path = ingest.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &bytes).unwrap();
        contents.insert(name.into(), *blake3::hash(&bytes).as_bytes());
    }
    (Image::of_dir(&dir), contents)
}

/// All states of the disk while the tree is stored and cleared.
fn trace(scene: &Scene, base: &Image) -> Vec<Moment> {
    let point = scene.path("mount");
    fs::create_dir(&point).unwrap();
    let mut disk = Disk::new(base, Rules::default());
    disk.record();
    let disk = scene.put(disk);
    let mut command = Command::new(RAIDTAPE);
    command.arg("--catalog").arg(scene.catalog()).arg("mount").arg(&point).arg("--foreground");
    command.env_remove("RAIDTAPE_CATALOG").env_remove("RAIDTAPE_LOG").stdin(Stdio::null());
    let mut daemon = command.stdout(Stdio::piped()).spawn().unwrap();
    let clear = Clear(point.clone());
    let mut line = String::new();
    BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("mounted "), "{line:?}");
    fs::write(point.join(".ctl/backup"), "ingest --clear --comment ingested\n").unwrap();
    let mut said = Value::Null;
    wait_for("the job", || {
        let text = fs::read_to_string(point.join(".ctl/jobs/1/progress.json")).unwrap_or_default();
        said = serde_json::from_str(&text).unwrap_or_default();
        matches!(said["state"].as_str(), Some("done" | "failed"))
    });
    let log = fs::read_to_string(point.join(".ctl/jobs/1/log")).unwrap();
    assert_eq!((&said["state"], &said["stayed"]), (&"done".into(), &0.into()), "{said} {log}");
    drop(clear);
    assert!(daemon.wait().unwrap().success());
    let moments = disk.lock().unwrap().moments.take();
    moments.unwrap()
}

/// The files below a directory.
fn files_below(dir: &Path, above: &str, found: &mut Contents) {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry.unwrap();
        let name = format!("{above}{}", entry.file_name().to_str().unwrap());
        match entry.file_type().unwrap().is_dir() {
            true => files_below(&entry.path(), &format!("{name}/"), found),
            false => {
                let bytes = fs::read(entry.path()).unwrap();
                found.insert(name.into(), *blake3::hash(&bytes).as_bytes());
            }
        }
    }
}

fn check(scene: &Scene, image: &Image, wanted: &Contents) -> Result<(), String> {
    let dir = scene.lay_out(image);
    let read = scene.read_all();
    if !read.is_clean || !read.problems.is_empty() {
        return Err(format!("{:?}", read.problems));
    }
    let mut found = read.runs.get("ingested").cloned().unwrap_or_default();
    if !found.is_empty() && &found != wanted {
        return Err(format!("the run holds {} files", found.len()));
    }
    files_below(&dir.join("c/catalog.ingest"), "", &mut found);
    for (name, hash) in wanted {
        if found.get(name) != Some(hash) {
            return Err(format!("{} is neither there nor in a run", name.escape_ascii()));
        }
    }
    scene.back_up("three").map_err(|e| format!("the next backup: {e}"))?;
    fs::remove_dir_all(dir).unwrap();
    Ok(())
}

#[test]
fn what_is_cleared_is_in_a_run_wherever_it_stops() {
    let start = Instant::now();
    let scene = Scene::new();
    let (base, wanted) = base(&scene);
    let moments = trace(&scene, &base);
    let mut seen = std::collections::BTreeSet::new();
    for (number, moment) in moments.iter().enumerate() {
        let seeds = (0..3).map(|it| Cut::Some(number as u64 * 3 + it));
        for cut in [Cut::Kept, Cut::Lost, Cut::Empty, Cut::Nameless].into_iter().chain(seeds) {
            let image = moment.cut(cut);
            if seen.insert(image.digest())
                && let Err(e) = check(&scene, &image, &wanted)
            {
                let (op, what) = (moment.op, &moment.what);
                panic!("ingest: {cut:?} after operation {number} ({op:?} {what}): {e}");
            }
        }
    }
    let (count, time) = (moments.len() - 1, start.elapsed().as_secs_f64());
    tell(&format!("ingest and clear: {count} operations, {} states, {time:.1} s", seen.len()));
    // Only then something was tried.
    assert!(moments.iter().any(|it| it.what.contains("catalog.ingest")));
}
