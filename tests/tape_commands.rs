//! The commands of t0p, as a person types them, on real drives with a changer; and tapes of which
//! nothing is known but what is on them, read by `mt`, `dd` and `cpio`. For the machine with real
//! drives, see scripts/tape-vm/run; `tape_drive` runs them there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use raidtape::tape::changer::{Changer, Library};

use crate::common::data::Seeded;
use crate::common::tape::{vm, vtl};
use crate::common::verbs::Place;
use crate::common::{RAIDTAPE, run};

/// Runs a line of a shell in a directory; gives what it prints, on both.
#[track_caller]
fn shell(dir: &Path, line: &str) -> String {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("exec 2>&1; {line}")]).current_dir(dir).env("LC_ALL", "C");
    run(&mut command).code(0).text()
}

/// The label of the tape in the drive, as `dd` shows it, and the command in it for a tape file.
fn label_by_hand(dir: &Path, label: &str, filenum: u32) -> String {
    let text =
        shell(dir, "mt -f /dev/nst0 rewind; dd if=/dev/nst0 bs=1M status=none | head -c 500");
    assert!(text.starts_with(&format!("t0version:1\nlabel:{label}\n")), "{text}");
    let how = text.lines().find_map(|it| it.strip_prefix("read:")).expect("it says how to read");
    how.replace("FILE", &filenum.to_string())
}

/// Gets what is on tapes into a directory as label and guide say, with nothing but `mt`, `dd` and
/// `cpio`, and then the newest run out of there by the script; gives where that is. Of each tape,
/// the tape file that is the first of ours.
pub fn unpack_by_hand(changer: &Changer, dir: &Path, tapes: &[(&str, u32)]) -> PathBuf {
    assert_eq!(vm("TAPE"), "/dev/nst0", "the drive that the guide names");
    fs::create_dir(dir).unwrap();
    for (label, filenum) in tapes {
        changer.load(label.as_bytes(), 0).unwrap();
        let said = shell(dir, &label_by_hand(dir, label, *filenum));
        assert!(said.contains(" copied,"), "{said}");
        let guide = fs::read_to_string(dir.join("TAPES.txt")).unwrap();
        let line = guide.lines().find(|it| it.starts_with("    dd ") && it.contains("cpio"));
        let line = line.expect("the guide says what to do").trim();
        let mut files = 1;
        loop {
            let said = shell(dir, line);
            if said.contains("\n0 bytes copied") {
                break;
            }
            assert!(said.contains(" copied,"), "{said}");
            files += 1;
        }
        assert!(files > 1, "{label}: one tape file");
    }
    let restored = dir.join("restored");
    shell(dir, "sh restore.sh get 1 / restored");
    restored
}

const MIB: usize = 1 << 20;

/// Two jobs over two cartridges, with the end of the tape in the middle, and everything that there
/// is to be asked of them.
pub fn on_real_drives() {
    let place = Place::new();
    let library = vm("CHANGER");
    for (number, device) in vm("TAPE_DRIVES").split_whitespace().enumerate() {
        let (name, number) = (format!("d{number}"), number.to_string());
        let line = ["t0p", "init", "-d", &name, "--changer", &library, "--changer-drive", &number];
        place.ok(&[&line[..], &[device]].concat());
        // Whatever others have left there.
        place.ok(&["t0eject", "-d", &name]);
    }
    let t0 = |words: &[&str]| {
        let (verb, rest) = words.split_first().unwrap();
        place.ok(&[&[*verb, "-d", "d0"], rest].concat())
    };
    assert!(place.fails(7, &["t0tell", "-d", "d0"]).contains("no tape in drive d0"));
    t0(&["t0reset"]);
    // The tapes are called otherwise than the library calls them.
    vtl("import SMALL1L8 16");
    for (barcode, label) in [("SMALL1L8", "A"), ("TVM002L8", "B")] {
        t0(&["t0load", barcode]);
        t0(&["t0label", "-w", "-f", "-b", "262144", label]);
        t0(&["t0label", "-k", label]);
    }
    assert_eq!(t0(&["t0load", "A"]), "tape A");
    assert_eq!(t0(&["t0label"]), "A");
    assert_eq!(t0(&["t0tell"]), "file 0 position 1");
    // It is there already by its other name, stays if another cannot come, and is taken in again
    // when somebody has unloaded it.
    assert_eq!(t0(&["t0load", "SMALL1L8"]), "tape A");
    place.fails(7, &["t0load", "-d", "d0", "TYPO"]);
    assert_eq!(t0(&["t0label"]), "A");
    shell(&place.base, "mt -f /dev/nst0 offline");
    assert_eq!(t0(&["t0load", "A"]), "tape A");
    t0(&["t0eject"]);
    assert!(t0(&["t0stat"]).contains("\nno tape"));

    // 24 MiB; the first cartridge has 16.
    let (src, names) = source(&place.base);
    let root = format!("root={}", src.display());
    fs::write(place.base.join("spool/pool/two"), "A\nB\n").unwrap();
    let jobs: Vec<String> = [&names[..4], &names[4..]]
        .iter()
        .map(|names| {
            let job = place.ok(&["t0job", "-c", "-p", &root, "-p", "pool=two"]);
            assert_eq!(place.feed(&["t0job", "-a", &job], &(names.join("\n") + "\n")).0, 0);
            t0(&["t0queue", "-a", &job]);
            job
        })
        .collect();
    // The drive is empty, and no tape is named.
    t0(&["t0write", "-a", "--buffer", "8M"]);
    assert_eq!(place.ok(&["t0job", "-l"]), "");
    assert_eq!(t0(&["t0label"]), "B");

    // Where is what.
    let files = |scanned: &str| -> Vec<(u64, u64, String)> {
        let lines = scanned.lines().map(|line| {
            let mut words = line.splitn(3, ' ');
            let mut number = || words.next().unwrap().parse().unwrap();
            (number(), number(), words.next().unwrap().to_owned())
        });
        lines.collect()
    };
    let on_b = files(&t0(&["t0scan"]));
    assert_eq!((on_b.len(), &*on_b[0].2), (2, "tape B"), "{on_b:?}");
    assert!(on_b[1].2.starts_with(&format!("{} 1 ", jobs[1])), "{on_b:?}");
    assert_eq!(t0(&["t0load", "A"]), "tape A");
    let on_a = files(&t0(&["t0scan"]));
    assert_eq!((on_a.len(), on_a[1].1), (3, 2), "{on_a:?}");
    assert!(on_a[1].2.starts_with(&format!("{} 0 4", jobs[0])), "{on_a:?}");
    assert!(on_a[2].2.starts_with(&format!("{} 0 ", jobs[1])), "{on_a:?}");
    // Moves are what another program sees too.
    let second = on_a[2].1;
    let at = || shell(&place.base, "mt -f /dev/nst0 tell").trim().to_owned();
    for (to, file, position) in [
        ("1", 1, 2),
        ("+1", 2, second),
        ("-1", 1, 2),
        (&*format!("{}/0", jobs[1]), 2, second),
        ("0", 0, 0),
        ("2", 2, second),
    ] {
        assert_eq!(t0(&["t0seek", "-v", to]), format!("file {file} position {position}"), "{to}");
        assert_eq!(t0(&["t0tell"]), format!("file {file} position {position}"), "{to}");
        assert_eq!(at(), format!("At block {position}."), "{to}");
    }
    t0(&["t0seek", "end"]);
    let end = t0(&["t0tell"]);
    assert!(end.starts_with("file 3 position "), "{end}");
    place.fails(1, &["t0seek", "-d", "d0", "9"]);
    place.fails(7, &["t0seek", "-d", "d0", &format!("{}/1", jobs[1])]);

    // All of both tapes is right.
    for (label, tape_files) in [("A", 2), ("B", 1)] {
        t0(&["t0load", label]);
        let said = t0(&["t0ck", "-t", label, "-v"]);
        assert!(said.contains(&format!("\n{tape_files} tape files, ")), "{said}");
        assert!(said.ends_with(" of them by their sums: 0 errors"), "{said}");
    }

    // Back by the changer: a file, a pattern, a whole job that is on both tapes.
    let back = |words: &[&str], wanted: &[String]| {
        let out = place.base.join("out");
        fs::create_dir(&out).unwrap();
        let line = [&["t0read", "-C", out.to_str().unwrap()], words].concat();
        t0(&line);
        let mut found: Vec<String> = fs::read_dir(&out)
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, wanted, "{words:?}");
        for name in found {
            let read = fs::read(out.join(&name)).unwrap();
            assert!(read == fs::read(src.join(&name)).unwrap(), "{name} of {words:?}");
        }
        fs::remove_dir_all(&out).unwrap();
    };
    back(&[&jobs[0], "file03"], &names[3..4]);
    back(&[&jobs[1], "file0[5-8]"], &names[5..9]);
    back(&[&jobs[1]], &names[4..]);
    t0(&["t0load", "A"]);
    back(&["--file", "1"], &names[..4]);
    let listed = t0(&["t0read", "--file", "1", "-l"]);
    assert_eq!(listed.lines().filter(|it| it.contains(" 1048576 file0")).count(), 2, "{listed}");
    let found = place.ok(&["t0find", src.join("file23").to_str().unwrap()]);
    assert!(found.starts_with("B 1 ") && found.contains(&jobs[1]), "{found}");

    // By hand, from what the label says. The blocks are longer than what a pipe holds.
    let out = place.base.join("by-hand");
    fs::create_dir(&out).unwrap();
    for (filenum, names) in [(1, &names[..4]), (2, &names[4..10])] {
        shell(&out, &label_by_hand(&out, "A", filenum));
        for name in names {
            assert!(fs::read(out.join(name)).unwrap() == fs::read(src.join(name)).unwrap());
        }
        // And the drive stands behind it.
        assert_eq!(
            at(),
            match filenum {
                1 => format!("At block {second}."),
                _ => end.replace("file 3 position", "At block") + ".",
            }
        );
    }
    t0(&["t0eject"]);
    assert_eq!(place.ok(&["t0tapes"]), "offline A\noffline B");
}

/// A WORM cartridge that meets its end, written by one whom the kernel does not let ask what it is.
pub fn a_hidden_worm_tape() {
    let place = Place::new();
    let changer = Changer::Library(Library::new(vm("CHANGER")));
    // The library has two mail slots. After each change the first command is refused.
    changer.unload(0).unwrap();
    vtl("export WRM001LX");
    changer.inventory().unwrap();
    vtl("import WRM002LX 16 worm");
    changer.load(b"WRM002LX", 0).unwrap();
    place.ok(&["t0p", "init", "-d", "d0", &vm("TAPE")]);
    let root = place.base.join("spool").display().to_string();
    let unprivileged = |words: &str| {
        let drop = "setpriv --bounding-set -sys_rawio --inh-caps -sys_rawio";
        let line = format!("T0P_ROOT={root} {drop} {RAIDTAPE} t0p {words}; echo ended $?");
        shell(&place.base, &line)
    };
    assert_eq!(unprivileged("label -w W").trim(), "ended 0");
    let (src, names) = source(&place.base);
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", src.display())]);
    assert_eq!(place.feed(&["t0job", "-a", &job], &(names.join("\n") + "\n")).0, 0);
    place.ok(&["t0queue", "-a", &job]);
    let said = unprivileged("write -a -v --buffer 8M -b 256k");
    let (is_full, is_kept) =
        (said.contains("tape W is full"), said.contains("is file 1 of tape W"));
    assert!(is_full && is_kept && said.ends_with("ended 7\n"), "{said}");
    assert!(!place.ok(&["t0tapes", "-v"]).contains("worm"), "nobody has told");
    assert!(place.ok(&["t0stat"]).contains("worm"));
    assert!(place.ok(&["t0ck"]).ends_with(": 0 errors"));
    changer.load(b"TVM004L8", 0).unwrap();
    place.ok(&["t0label", "-w", "-f", "N"]);
    place.ok(&["t0write", "-a", "-t", "N", "--buffer", "8M"]);
    assert_eq!(place.ok(&["t0job", "-l"]), "");
    assert!(place.ok(&["t0ck"]).ends_with(": 0 errors"));
    changer.unload(0).unwrap();
}

/// 24 files of about 1 MiB, of which 16 are links: the machine has little memory. Gives their names
/// in order.
fn source(base: &Path) -> (PathBuf, Vec<String>) {
    let src = base.join("src");
    fs::create_dir(&src).unwrap();
    let names: Vec<String> = (0..24).map(|it| format!("file{it:02}")).collect();
    for (at, name) in names.iter().enumerate() {
        let path = src.join(name);
        match at < 8 {
            true => {
                fs::write(path, Seeded::new(at as u64).noise(MIB - at % 2)).unwrap();
            }
            false => fs::hard_link(src.join(&names[at % 8]), path).unwrap(),
        }
    }
    (src, names)
}
