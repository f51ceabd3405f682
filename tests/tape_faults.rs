//! A drive that fails at each of its operations in turn: what was acknowledged is on the tape, and
//! the next one appends behind it.

use std::path::Path;

use raidtape::error::{Error, ErrorKind, Result};
use raidtape::tape::drive::{Drive, Moved, Why, Wrote};
use raidtape::tape::medium::Medium;

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tape::{blank, open_image, rest, scratch};

const TROUBLES: [Trouble; 6] = [
    Trouble::Medium,
    Trouble::Reset,
    Trouble::Stop,
    Trouble::Refused(Why::EarlyWarning),
    Trouble::Refused(Why::Physical),
    Trouble::Refused(Why::Protected),
];

/// What a tape file is made of.
fn block(file: u8, number: u8) -> Vec<u8> {
    vec![file * 16 + number; 100 + usize::from(number)]
}

/// What was refused is an error here.
fn done(wrote: Wrote) -> Result<()> {
    match wrote {
        Wrote::Whole => Ok(()),
        Wrote::NotWritten(why) => Err(Error::new(ErrorKind::NoSpace, format!("{why:?}"))),
    }
}

/// Writes tape files, behind all that is there or from here on; counts those that are safe.
fn append_files(mut drive: Box<dyn Drive>, safe: &mut u8, at_end: bool) -> Result<()> {
    if at_end {
        drive.to_end_of_data()?;
    }
    for file in *safe..4 {
        for number in 0..3 {
            done(drive.write(&block(file, number))?)?;
        }
        done(drive.write_filemarks(1)?)?;
        *safe += 1;
    }
    drive.rewind()?;
    drive.close()
}

/// The tape files that are whole, from the first on.
fn whole_files(path: &Path) -> u8 {
    let objects = rest(&mut *open_image(path));
    let files = objects.split(Option::is_none);
    let expected = |file: u8| -> Vec<_> { (0..3).map(|it| Some(block(file, it))).collect() };
    (0..).zip(files).take_while(|(number, it)| **it == expected(*number)).count() as u8
}

#[test]
fn what_is_acknowledged_survives_a_fault_at_every_operation() {
    for trouble in TROUBLES {
        for for_ever in [false, true] {
            let mut at = 1;
            loop {
                let dir = scratch();
                let path = blank(&dir, &Medium::default());
                let (drive, counter) =
                    FaultDrive::open(&path, Some(Plan { trouble, at, for_ever }));
                let mut safe = 0;
                let ended = append_files(drive, &mut safe, true);
                let what = format!("{trouble:?} at {at}, {ended:?}");
                assert!(whole_files(&path) >= safe, "{what}: {safe} files were safe");
                assert_eq!(ended.is_err(), counter.hits() > 0, "{what}");
                if counter.operations() < at {
                    assert!(at > 15, "{what}: where are the operations?");
                    break;
                }
                // What is behind the files that are safe is written over.
                let mut drive = open_image(&path);
                assert_eq!(drive.space_files(safe.into()).unwrap(), behind(safe));
                append_files(drive, &mut safe, false).unwrap();
                assert_eq!(whole_files(&path), 4, "{what}");
                at += 1;
            }
        }
    }
}

fn behind(files: u8) -> Moved {
    if files == 0 { Moved::Beginning } else { Moved::There }
}
