//! Drives: what must hold on an image and on the kernel's `st` driver alike, and what only real
//! drives do. Those are in a small machine of their own, see scripts/tape-vm/run.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};
use raidtape::error::ErrorKind;
use raidtape::tape::changer::{Changer, Library};
use raidtape::tape::drive::{Access, BlockSize, Drive, Moved, Read, Why, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::medium::Medium;

use crate::common::tape::{Model, Stand, blank, in_vm, open_image, rest, scratch, steps, vm, vtl};

const BLOCK: usize = 32768;

fn block(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK]
}

/// Three tape files: two blocks, one, and one.
fn write_three_files(drive: &mut dyn Drive) {
    drive.rewind().unwrap();
    for file in [&b"AB"[..], b"C", b"D"] {
        for fill in file {
            assert_eq!(drive.write(&block(*fill)).unwrap(), Wrote::Whole);
        }
        assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    }
}

/// The first bytes of all blocks from the beginning on, and `|` for a filemark.
fn shape(drive: &mut dyn Drive) -> String {
    drive.rewind().unwrap();
    rest(drive).iter().map(|it| it.as_ref().map_or('|', |it| char::from(it[0]))).collect()
}

/// What must hold of every drive. The tape is blank.
fn conforms(stand: &mut Stand) {
    let drive = stand.drive();
    let mut buffer = vec![0; 2 * BLOCK];
    drive.rewind().unwrap();
    for _ in 0..2 {
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::EndOfData, "a blank tape");
        assert_eq!(drive.position().unwrap(), 0);
    }
    drive.to_end_of_data().unwrap();
    assert_eq!((drive.position().unwrap(), drive.locate(5).unwrap()), (0, Moved::EndOfData));
    assert_eq!(drive.space_files(1).unwrap(), Moved::EndOfData);
    assert_eq!(drive.space_files(0).unwrap(), Moved::Beginning);

    write_three_files(drive);
    assert_eq!(drive.position().unwrap(), 7);
    assert_eq!(shape(drive), "AB|C|D|");
    let state = drive.state().unwrap();
    assert!(state.online && state.at_end_of_data && !state.write_protected && !state.lost);
    drive.rewind().unwrap();
    assert_eq!(drive.read(&mut buffer[..100]).unwrap(), Read::TooLong);
    assert_eq!(drive.position().unwrap(), 1);
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(BLOCK));
    assert_eq!((buffer[0], drive.read(&mut buffer).unwrap()), (b'B', Read::Filemark));

    // Appended behind the end, after a look at what is there.
    assert_eq!(drive.locate(3).unwrap(), Moved::There);
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(BLOCK));
    assert_eq!(buffer[0], b'C');
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.position().unwrap(), 7);
    assert_eq!(drive.write(&block(b'E')).unwrap(), Wrote::Whole);
    // The filemark comes by itself.
    assert_eq!(shape(drive), "AB|C|D|E|");

    // What is overwritten takes all that is behind it.
    assert_eq!(drive.locate(4).unwrap(), Moved::There);
    assert_eq!(drive.write(&block(b'F')).unwrap(), Wrote::Whole);
    stand.reopen();
    let drive = stand.drive();
    assert_eq!(shape(drive), "AB|CF|");
    assert_eq!(drive.locate(99).unwrap(), Moved::EndOfData);
    assert_eq!(drive.position().unwrap(), 6);
    assert_eq!(drive.space_files(-1).unwrap(), Moved::There);
    assert_eq!(drive.position().unwrap(), 3);
    assert_eq!(drive.space_files(-9).unwrap(), Moved::Beginning);
    assert_eq!(drive.space_files(9).unwrap(), Moved::EndOfData);

    assert_eq!(drive.write(&[]).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(drive.write(&vec![0; 17 << 20]).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(drive.write_filemarks(1 << 30).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(drive.position().unwrap(), 6);
    fixed_blocks(drive);
}

fn fixed_blocks(drive: &mut dyn Drive) {
    drive.rewind().unwrap();
    drive.set_block_size(BlockSize::Fixed(512)).unwrap();
    assert_eq!(drive.state().unwrap().block_size, BlockSize::Fixed(512));
    assert_eq!(drive.write(&[1; 100]).unwrap_err().kind(), ErrorKind::Usage);
    for fill in 1..4 {
        assert_eq!(drive.write(&[fill; 512]).unwrap(), Wrote::Whole);
    }
    drive.set_block_size(BlockSize::Variable).unwrap();
    assert_eq!(drive.write(&[4; 100]).unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(rest(drive).iter().map(|it| it.as_ref().map_or(0, Vec::len)).sum::<usize>(), 1636);
    drive.set_block_size(BlockSize::Fixed(512)).unwrap();
    drive.rewind().unwrap();
    let mut buffer = [0; 1000];
    for position in 1..4 {
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(512));
        assert_eq!((buffer[511], drive.position().unwrap()), (position as u8, position));
    }
    assert_eq!(drive.read(&mut buffer).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.position().unwrap(), 3);
    drive.set_block_size(BlockSize::Variable).unwrap();
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(100));
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Filemark);
    assert_eq!(drive.set_block_size(BlockSize::Fixed(0)).unwrap_err().kind(), ErrorKind::Usage);
}

/// Writes blocks up to the end of the tape, and tells what was said on the way. What is counted is
/// what is there.
fn fill(drive: &mut dyn Drive, len: usize) -> (u64, u64) {
    drive.rewind().unwrap();
    let data: Vec<u8> = (0..len).map(|it| it as u8).collect();
    let (mut count, mut warned) = (0u64, None);
    loop {
        match drive.write(&data).unwrap() {
            Wrote::Whole => count += 1,
            Wrote::NotWritten(Why::EarlyWarning) => {
                assert_eq!(warned, None, "warned twice");
                warned = Some(count);
            }
            Wrote::NotWritten(why) => {
                assert_eq!(why, Why::Physical);
                break;
            }
        }
        assert_eq!(drive.position().unwrap(), count);
    }
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    let mut buffer = vec![0; len];
    for _ in 0..count {
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(len));
    }
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Filemark);
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::EndOfData);
    (warned.expect("no warning"), count)
}

/// A tape whose end is near is closed within what is left.
fn closes_near_the_end(drive: &mut dyn Drive) {
    drive.rewind().unwrap();
    let mut count = 0;
    while drive.write(&[1; 1 << 18]).unwrap() == Wrote::Whole {
        count += 1;
    }
    for _ in 0..3 {
        assert_eq!(drive.write(b"the end of the archive").unwrap(), Wrote::Whole);
    }
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    assert_eq!(drive.position().unwrap(), count + 4);
    // After a motion it is said anew.
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.write(b"one more").unwrap(), Wrote::Whole);
    assert_eq!(drive.write(b"one more").unwrap(), Wrote::NotWritten(Why::EarlyWarning));
    assert_eq!(drive.write(b"one more").unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(rest(drive).len() as u64, count + 7);
}

/// Random programs on a drive and on the plain model.
fn is_a_tape(stand: &mut Stand, programs: u32) {
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(Config::default().rng_algorithm),
    );
    for _ in 0..programs {
        let steps = steps().new_tree(&mut runner).unwrap().current();
        println!("{steps:?}");
        let mut model = Model::default();
        stand.drive().rewind().unwrap();
        // What is left of the one before.
        assert_eq!(stand.drive().write(b"x").unwrap(), Wrote::Whole);
        stand.drive().rewind().unwrap();
        model.objects = vec![Some(b"x".to_vec()), None];
        for (number, step) in steps.iter().enumerate() {
            model.take(stand, step, number);
        }
        model.begin_motion();
        stand.drive().rewind().unwrap();
        assert_eq!(rest(stand.drive()), model.objects);
    }
}

#[test]
fn an_image_does_what_a_drive_does() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let opened = path.clone();
    let mut stand = Stand::new(Box::new(move || open_image(&opened)), false);
    conforms(&mut stand);
    is_a_tape(&mut stand, 20);
    drop(stand);
    let medium = Medium { capacity: Some(4 << 20), early_warning: 1 << 20, ..Medium::default() };
    let path = dir.path().join("small.tap");
    Image::create(&path, &medium).unwrap();
    let mut drive = open_image(&path);
    let (warned, count) = fill(&mut *drive, 1000);
    assert_eq!((warned, count), ((3u64 << 20).div_ceil(1008), ((4 << 20) - 8) / 1008));
    closes_near_the_end(&mut *drive);
}

#[test]
fn a_drive_is_known_by_what_is_at_its_path() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let link = dir.path().join("device");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let mut drive = raidtape::tape::open(&link, Access::Write).unwrap();
    assert_eq!(drive.write(b"x").unwrap(), Wrote::Whole);
    drive.close().unwrap();
    let kind = |path: &Path| raidtape::tape::open(path, Access::Read).err().unwrap().kind();
    assert_eq!(kind(&dir.path().join("none")), ErrorKind::NotFound);
    assert_eq!(kind(Path::new("/dev/null")), ErrorKind::Io);
    let pipe = dir.path().join("pipe");
    crate::common::tool("mkfifo", [&pipe]);
    assert_eq!(kind(&pipe), ErrorKind::Usage);
}

// --- Changers -----------------------------------------------------------------------------------

#[test]
fn images_are_changed_by_name() {
    let dir = scratch();
    let shelf = dir.path().join("shelf");
    let drives = [dir.path().join("one"), dir.path().join("two")];
    for it in drives.iter().chain([&shelf]) {
        fs::create_dir(it).unwrap();
    }
    let names: [&[u8]; 3] = [b"T1", b"T\xff2", b"T3"];
    for name in names {
        let path = shelf.join(OsStr::from_bytes(name));
        let mut path = path.into_os_string();
        path.push(".tap");
        Image::create(Path::new(&path), &Medium::default()).unwrap();
    }
    fs::write(shelf.join("other"), "").unwrap();
    let changer = Changer::Shelf { dir: shelf, drives: drives.to_vec() };
    changer.unload(0).unwrap();
    for (number, name) in (0..).zip(names).take(2) {
        changer.load(name, number).unwrap();
        let mut drive = open_image(&drives[number as usize]);
        assert_eq!(drive.write(name).unwrap(), Wrote::Whole);
        drive.close().unwrap();
        changer.load(name, number).unwrap();
    }
    let inventory = changer.inventory().unwrap();
    assert_eq!(inventory.drives[1].tape.as_deref(), Some(names[1]));
    assert_eq!(inventory.slots.iter().filter(|it| it.is_full).count(), 1);
    assert_eq!(changer.load(names[1], 0).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(changer.load(b"T4", 0).unwrap_err().kind(), ErrorKind::WrongTape);
    assert_eq!(changer.load(names[2], 2).unwrap_err().kind(), ErrorKind::NotFound);
    // The other one goes back first.
    changer.load(names[2], 0).unwrap();
    changer.load(names[0], 1).unwrap();
    assert_eq!(rest(&mut *open_image(&drives[1])), [Some(b"T1".to_vec()), None]);
    changer.unload(1).unwrap();
    assert!(!open_image(&drives[1]).state().unwrap().online);
}

#[test]
fn a_program_that_is_no_mtx_does_no_harm() {
    let changer = |program: &str, device: &str| {
        Changer::Library(Library { program: program.into(), ..Library::new(device) })
    };
    let error = changer("/no/mtx", "/dev/sg0").inventory().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("install the package mtx"), "{error}");
    let dir = scratch();
    let program = |text: &str| {
        let path = dir.path().join("mtx");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    // Run by a shell, so that a child of another test that has it open does not matter.
    let said = |text: &str| changer(&program(text), "x").inventory().unwrap_err();
    let error = said("echo 'mtx: the robot is \x1b[stuck' >&2; exit 3");
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("the robot is \\u{1b}[stuck"), "{error}");
    assert_eq!(said("yes").kind(), ErrorKind::Corrupt);
    assert_eq!(said("yes >&2").kind(), ErrorKind::Io);
    assert_eq!(said("echo hello").kind(), ErrorKind::Corrupt);
}

#[test]
fn barcodes_that_mtx_has_passed_over_are_asked_for_again() {
    let dir = scratch();
    let program = dir.path().join("mtx");
    let first = dir.path().join("first");
    let script = format!(
        "#!/bin/sh\necho 'Data Transfer Element 0:Empty'\nif mkdir {0} 2>/dev/null; then\n\
         echo 'Storage Element 1:Full'\nelse\n\
         echo 'Storage Element 1:Full :VolumeTag=T1L8'\nfi\n",
        first.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let library = Library { program, ..Library::new("/dev/sg0") };
    let inventory = Changer::Library(library).inventory().unwrap();
    assert!(first.exists());
    assert_eq!(inventory.slots[0].tape.as_deref(), Some(&b"T1L8"[..]));
}

#[test]
fn a_changer_that_hangs_is_given_up() {
    let dir = scratch();
    let program = dir.path().join("mtx");
    // It hangs itself, or what it has started does and keeps its output open.
    for text in ["echo $$ >>DIR/ran; exec sleep 60", "echo $$ >>DIR/ran; sleep 5 &"] {
        let text = text.replace("DIR", dir.path().to_str().unwrap());
        fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let limit = Duration::from_secs(2);
        let library = Library { program: program.clone(), limit, ..Library::new("/dev/sg7") };
        let error = Changer::Library(library).inventory().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(
            error.to_string().contains("the changer /dev/sg7 has not done 'status'"),
            "{error}"
        );
        assert!(error.to_string().contains("mtx is not waited for: look whether"), "{error}");
    }
    // Once each, and the one that hung is gone.
    let ran = fs::read_to_string(dir.path().join("ran")).unwrap();
    let ran: Vec<&str> = ran.lines().collect();
    assert_eq!(ran.len(), 2);
    let status = || fs::read_to_string(format!("/proc/{}/status", ran[0]));
    crate::common::wait_for("the program to end", || {
        status().map_or(true, |it| it.contains("State:\tZ"))
    });
}

// --- Real drives --------------------------------------------------------------------------------

/// The first drive of the machine.
fn tape() -> PathBuf {
    PathBuf::from(vm("TAPE"))
}

fn open_tape(access: Access) -> Box<dyn Drive> {
    raidtape::tape::open(&tape(), access).unwrap()
}

fn changer() -> Changer {
    Changer::Library(Library::new(vm("CHANGER")))
}

fn real_stand() -> Stand {
    Stand::new(Box::new(|| open_tape(Access::Write)), true)
}

/// Everything that needs real drives, in one boot.
#[test]
fn real_drives() {
    if !in_vm("tape_drive::real_drives") {
        return;
    }
    let parts: [(&str, fn()); 18] = [
        ("an empty drive", empty_drive),
        ("a library", library),
        ("what every drive does", || conforms(&mut real_stand())),
        ("random programs", || is_a_tape(&mut real_stand(), 25)),
        ("the end of a tape", end_of_tape),
        ("errors of a write", errors_of_a_write),
        ("errors of a read", errors_of_a_read),
        ("errors of a filemark", errors_of_a_filemark),
        ("errors of a motion", errors_of_a_motion),
        ("a reset while writing", reset_while_writing),
        ("a reset while reading", reset_while_reading),
        ("a reset and fixed blocks", reset_and_fixed_blocks),
        ("write protection", write_protection),
        ("a worm tape", worm_tape),
        ("jobs over two cartridges", crate::tape_write::over_two_cartridges),
        ("a run over two cartridges", crate::tape_recall::on_real_drives),
        ("the commands", crate::tape_commands::on_real_drives),
        ("a worm tape that is not told of", crate::tape_commands::a_hidden_worm_tape),
    ];
    for (name, part) in parts {
        let begun = Instant::now();
        part();
        println!("{name}: {} ms", begun.elapsed().as_millis());
    }
}

fn empty_drive() {
    let mut drive = open_tape(Access::Write);
    assert!(!drive.state().unwrap().online);
    assert_eq!(drive.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::WrongTape);
    assert_eq!(drive.write(b"x").unwrap_err().kind(), ErrorKind::WrongTape);
    assert_eq!(drive.rewind().unwrap_err().kind(), ErrorKind::WrongTape);
    drive.close().unwrap();
}

fn library() {
    let changer = changer();
    let inventory = changer.inventory().unwrap();
    assert_eq!(inventory.drives.len(), 2);
    assert_eq!(inventory.slots.iter().filter(|it| it.is_mail).count(), 2);
    changer.load(b"TVM002L8", 0).unwrap();
    changer.load(b"TVM002L8", 0).unwrap();
    assert_eq!(changer.load(b"TVM002L8", 1).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(changer.load(b"TVM009L8", 1).unwrap_err().kind(), ErrorKind::WrongTape);
    let mut drive = open_tape(Access::Write);
    let second = raidtape::tape::open(&tape(), Access::Read).err().unwrap();
    assert_eq!(second.kind(), ErrorKind::Locked);
    drive.rewind().unwrap();
    drive.unload().unwrap();
    assert!(!drive.state().unwrap().online);
    drive.close().unwrap();
    // The tape before goes back to its slot.
    changer.load(b"TVM001L8", 0).unwrap();
    let inventory = changer.inventory().unwrap();
    assert_eq!(inventory.drives[0].tape.as_deref(), Some(&b"TVM001L8"[..]));
    assert_eq!(inventory.slots[1].tape.as_deref(), Some(&b"TVM002L8"[..]));
    vtl("fault 2 a5 0 1 4 15 01");
    assert_eq!(changer.unload(0).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(changer.inventory().unwrap().drives[0].from, Some(1));
}

fn end_of_tape() {
    let mut drive = open_tape(Access::Write);
    let (warned, count) = fill(&mut *drive, 1 << 18);
    // 64 MiB, of which a 32nd is kept for the warning.
    assert_eq!((warned, count), (248, 256));
    closes_near_the_end(&mut *drive);
}

/// The tape as it was written, and the drive as it must be used after an error.
fn assert_kept(drive: &mut dyn Drive, expected: &str) {
    assert_eq!(shape(drive), expected);
}

fn errors_of_a_write() {
    // Longer than the adapter takes, right behind a filemark: nothing is written, also not by st.
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    assert_eq!(drive.write(&vec![0; 4 << 20]).unwrap_err().kind(), ErrorKind::Usage);
    drive.rewind().unwrap();
    assert_kept(&mut *drive, "AB|C|D|");
    drive.close().unwrap();
    // Medium error, hardware error, not ready, aborted.
    for fault in ["3 0c 00", "4 44 00", "2 04 01", "b 00 00"] {
        let mut drive = open_tape(Access::Write);
        write_three_files(&mut *drive);
        assert_eq!(drive.write(&block(b'E')).unwrap(), Wrote::Whole);
        vtl(&format!("fault 0 0a 0 1 {fault}"));
        assert_eq!(drive.write(&block(b'x')).unwrap_err().kind(), ErrorKind::Io);
        // The drive has not moved: who writes may try once more.
        assert!(!drive.state().unwrap().lost);
        assert_eq!(drive.position().unwrap(), 8);
        assert_eq!(drive.write(&block(b'F')).unwrap(), Wrote::Whole);
        drive.close().unwrap();
        assert_kept(&mut *open_tape(Access::Read), "AB|C|D|EF|");
    }
    // A recovered error is none.
    let mut drive = open_tape(Access::Write);
    drive.to_end_of_data().unwrap();
    vtl("fault 0 0a 0 1 1 17 00");
    assert_eq!(drive.write(&block(b'G')).unwrap(), Wrote::Whole);
    assert_kept(&mut *drive, "AB|C|D|EF|G|");
}

fn errors_of_a_read() {
    let mut drive = open_tape(Access::Read);
    drive.rewind().unwrap();
    // More than the adapter moves at once.
    let mut buffer = vec![0; 8 << 20];
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(BLOCK));
    vtl("fault 0 08 0 1 3 11 00");
    assert_eq!(drive.read(&mut buffer).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.position().unwrap(), 1);
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(BLOCK));
    assert_eq!(buffer[0], b'B');
    let error = drive.write(&buffer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
}

fn errors_of_a_filemark() {
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    assert_eq!(drive.write(&block(b'E')).unwrap(), Wrote::Whole);
    vtl("fault 0 10 0 1 3 0c 00");
    assert_eq!(drive.write_filemarks(1).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    // The one that comes by itself.
    assert_eq!(drive.write(&block(b'F')).unwrap(), Wrote::Whole);
    vtl("fault 0 10 0 1 3 0c 00");
    assert_eq!(drive.close().unwrap_err().kind(), ErrorKind::Io);
    let mut drive = open_tape(Access::Write);
    assert!(shape(&mut *drive).starts_with("AB|C|D|E|F"));
}

fn errors_of_a_motion() {
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    for opcode in ["2b", "92"] {
        vtl(&format!("fault 0 {opcode} 0 1 3 15 02"));
    }
    assert_eq!(drive.locate(3).unwrap_err().kind(), ErrorKind::Io);
    assert!(drive.state().unwrap().lost);
    vtl("clear");
    assert_eq!(drive.write(&block(b'x')).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.locate(3).unwrap(), Moved::There);
    vtl("fault 0 11 0 1 4 15 01");
    assert_eq!(drive.space_files(1).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.space_files(1).unwrap_err().kind(), ErrorKind::Io);
    assert_kept(&mut *drive, "AB|C|D|");
}

/// After a reset the drive is at the beginning, and nobody writes there: not the program that goes
/// on, nor the one that closes or rewinds.
fn reset_while_writing() {
    type End = fn(Box<dyn Drive>);
    let endings: [(&str, End); 4] = [
        ("closed", |it| assert_eq!(it.close().unwrap_err().kind(), ErrorKind::Io)),
        ("dropped", drop),
        ("rewound", |mut it| it.rewind().unwrap()),
        ("at its end", |mut it| {
            it.to_end_of_data().unwrap();
            assert!(it.position().unwrap() >= 7);
        }),
    ];
    for (name, end) in endings {
        for is_in_block in [true, false] {
            let mut drive = open_tape(Access::Write);
            write_three_files(&mut *drive);
            if is_in_block {
                // It is not on the tape for sure before a filemark.
                assert_eq!(drive.write(&block(b'E')).unwrap(), Wrote::Whole);
            }
            vtl("reset 0");
            let error = drive.write(&block(b'x')).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().contains("has lost its place"), "{error}");
            assert!(drive.state().unwrap().lost);
            for _ in 0..2 {
                assert!(drive.write(&block(b'x')).is_err(), "{name}");
                assert!(drive.write_filemarks(1).is_err(), "{name}");
                assert!(drive.read(&mut [0; BLOCK]).is_err(), "{name}");
                assert!(drive.position().is_err(), "{name}");
            }
            if is_in_block || name != "closed" {
                end(drive);
            } else {
                drive.close().unwrap();
            }
            let shape = shape(&mut *open_tape(Access::Read));
            assert!(shape.starts_with("AB|C|D|"), "{name}: {shape}");
        }
    }
}

fn reset_while_reading() {
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    assert_eq!(drive.locate(3).unwrap(), Moved::There);
    vtl("reset 0");
    // The next read would give the first block of the tape.
    let mut buffer = vec![0; BLOCK];
    for _ in 0..3 {
        assert_eq!(drive.read(&mut buffer).unwrap_err().kind(), ErrorKind::Io);
    }
    assert_eq!(drive.locate(3).unwrap(), Moved::There);
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(BLOCK));
    assert_eq!(buffer[0], b'C');
    vtl("reset 0");
    assert_eq!(drive.write_filemarks(1).unwrap_err().kind(), ErrorKind::Io);
    assert_kept(&mut *drive, "AB|C|D|");
}

fn reset_and_fixed_blocks() {
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    drive.set_block_size(BlockSize::Fixed(512)).unwrap();
    for fill in 1..4 {
        assert_eq!(drive.write(&[fill; 512]).unwrap(), Wrote::Whole);
    }
    vtl("reset 0");
    for _ in 0..3 {
        assert_eq!(drive.write(&[9; 512]).unwrap_err().kind(), ErrorKind::Io);
    }
    drop(drive);
    let shape = shape(&mut *open_tape(Access::Read));
    assert!(shape.starts_with("AB|C|D|"), "{shape}");
}

fn write_protection() {
    let mut drive = open_tape(Access::Write);
    write_three_files(&mut *drive);
    drive.unload().unwrap();
    drive.close().unwrap();
    let changer = changer();
    changer.unload(0).unwrap();
    vtl("protect TVM001L8");
    changer.load(b"TVM001L8", 0).unwrap();
    let mut drive = open_tape(Access::Write);
    assert!(drive.state().unwrap().write_protected);
    assert_eq!(drive.write(&block(b'x')).unwrap(), Wrote::NotWritten(Why::Protected));
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::NotWritten(Why::Protected));
    assert_kept(&mut *drive, "AB|C|D|");
    drive.close().unwrap();
    changer.unload(0).unwrap();
    vtl("unprotect TVM001L8");
}

fn worm_tape() {
    vtl("import WRM001LX 64 worm");
    let changer = changer();
    changer.load(b"WRM001LX", 0).unwrap();
    let mut drive = open_tape(Access::Write);
    assert_eq!(drive.state().unwrap().worm, Some(true));
    write_three_files(&mut *drive);
    drive.rewind().unwrap();
    assert_eq!(drive.write(&block(b'x')).unwrap(), Wrote::NotWritten(Why::Worm));
    assert_eq!(drive.position().unwrap(), 0);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::NotWritten(Why::Worm));
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.write(&block(b'E')).unwrap(), Wrote::Whole);
    assert_kept(&mut *drive, "AB|C|D|E|");
    vtl("fault 0 0a 0 1 4 44 00");
    assert_eq!(drive.write(&block(b'x')).unwrap_err().kind(), ErrorKind::Io);
    drive.close().unwrap();
}
