//! Tests of the whole program: real trees, real mounts, real crashes, no simulation.
//!
//! They need /dev/fuse, and some need root; what is missing is an error, never a reason to skip.
//! `RAIDTAPE_TEST_FILES` and `RAIDTAPE_TEST_GIB` make the trees as large as wanted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

/// The store, the programs, mounts, trees and data that tests are made of.
mod common;

/// What is backed up comes back, by every way out.
mod backup_restore;
/// Files that change, vanish or fail while they are read, and changes that look like none.
mod changing;
/// Copies of the catalog on the volumes.
mod catalog_copy;
/// A catalog taken back from its copies.
mod catalog_restore;
/// Runs after the first: what they store, report and share.
mod changes;
/// What a run has stored goes from the writable tree, and nothing else does.
mod clearing;
/// Several copies of each block.
mod copies;
/// The command line: exit codes, JSON, refusals, hostile targets.
mod cli;
/// Control files: lines of every shape, refusals, who may.
mod control;
/// Processes that die: in the middle of a backup, or while they serve a mount.
mod crash;
/// What fuzzing has kept.
mod corpus;
/// Damaged blocks: what is named, what still reads.
mod damage;
/// The logical dump of a catalog.
mod dump_catalog;
/// Faults at every operation.
mod faults;
/// The torture tree, and all metadata there is.
mod fidelity;
/// What a backup leaves out, and what it would do.
mod filters;
/// Stores that earlier programs wrote.
mod fixtures;
/// Disks that are really full.
mod full_disks;
/// Restores and validations as jobs; metas and manifests made anew.
mod genmeta;
/// The writable tree of a mount.
mod ingest;
/// The writable tree and its disk: fsync, and no space left.
mod ingest_disk;
/// Jobs by control file: taken, refused, watched, cancelled.
mod jobs;
/// How much memory the program takes.
mod memory;
/// Random trees and random changes against a plain model.
mod model;
/// Mounting and unmounting: options, dead mounts, signals, systemd, mount(8).
mod mounting;
/// The mount: an ordinary tree under ordinary tools.
mod mount;
/// Readers of a mount that has other things to do, or dies.
mod mount_busy;
/// Damaged blocks under a mount.
mod mount_damage;
/// Disks that do not answer, under a mount.
mod mount_hung;
/// Random programs on a real mount, and random changes in `/ingest`.
mod mount_model;
/// The sessions of a mount: what must hold in each way of mounting.
mod mount_modes;
/// Changes that a mount refuses.
mod mount_refusals;
/// What a mount shows.
mod mount_semantics;
/// What programs do with the files of a mount.
mod mount_use;
/// Who may read what in a mount.
mod mount_users;
/// Odd names, kinds, times and attributes.
mod names;
/// Blocks that are on tape and on no disk.
mod on_tape;
/// What the documents promise, and the tests for it.
mod promises;
/// Asking the runs: diff, find, stats, dump.
mod queries;
/// Reading snapshots: ahead, in parts, from other copies, and past the program.
mod reads;
/// A lost catalog comes back from its volumes.
mod rebuild;
/// A doubtful catalog held against its volumes.
mod rebuild_catalog;
/// What recovery says, leaves behind, and does not believe.
mod recovery;
/// Repair of what is damaged.
mod repair;
/// Files come back without the program: the script on a volume.
mod restore_script;
/// Restoring onto what is there: overwriting, deleting, parts, owners, hostile targets.
mod restore;
/// Full volumes.
mod rotation;
/// Completions and manual pages.
mod shell;
/// Blocks on simulated stores.
mod simulated;
/// Backups of what comes through a pipe.
mod streams;
/// What reading tapes finds out, and what then counts.
mod tape_doubt;
/// Archives for tape, and the other programs that read and write them.
mod tape_formats;
/// Tapes, known by their first block.
mod tape_loaded;
/// Runs on tape, and back.
mod tape_recall;
/// A catalog from tapes of which not all are right.
mod tape_rebuild;
/// The spool of tape jobs: its files, and what crashes leave of them.
mod tape_spool;
/// The commands of t0p.
mod tape_verbs;
/// The commands of t0p on real drives, and tapes that others' programs read there.
mod tape_commands;
/// Tape drives: images, and real ones in a machine of their own.
mod tape_drive;
/// Tape drives that fail.
mod tape_faults;
/// Jobs that are written to tape.
mod tape_write;
/// Writing to tape that is ended, at every step of drive and spool.
mod tape_write_faults;
/// Runs that are archived to tape, and what is known of them.
mod tape_runs;
/// Tape images: a model, crashes, those of others.
mod tape_image;
/// Labels, and the drive that a tape is in.
mod tape_label;
/// Reading tapes.
mod tape_read;
/// Reading jobs back, and checking tapes.
mod tape_readback;
/// Files, archives and reads that were never whole.
mod tape_unwhole;
/// Questions to who sits at the terminal.
mod tape_asking;
/// Following what a drive does.
mod tape_watch;
/// Rules of the house, checked on the sources.
mod tidy;
/// What a validation looks at, finds and remembers.
mod validate;
/// Validation of runs: lost ones, and what they have not stored.
mod validate_runs;
/// Those who wait for jobs, and jobs that wait for others.
mod waiting;

use std::path::Path;

/// A file that nobody lists is never compiled, and its tests never run.
#[test]
fn every_file_is_listed() {
    fn check(list: &Path, dir: &Path, own: &str) {
        let text = std::fs::read_to_string(list).unwrap();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && stem == "data" {
                // What tests read is no test.
                continue;
            } else if path.is_dir() {
                check(&path.join("mod.rs"), &path, "mod");
            } else if path.extension().is_none_or(|it| it != "rs") || stem == own {
                continue;
            }
            let listed = [format!("mod {stem};"), format!("pub mod {stem};")];
            let found = text.lines().any(|line| listed.iter().any(|it| line == it));
            assert!(found, "{} is not listed in {}", path.display(), list.display());
        }
    }
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    check(&tests.join("main.rs"), &tests, "main");
}
