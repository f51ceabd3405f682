//! Blocks that are damaged, cut or gone while a mount has them: which files fail, in every way of
//! mounting, and that nothing of it is remembered when the block is whole again.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::mount::MODES;
use crate::common::{Mount, Sandbox, data, path_of};
use crate::damage::{Affected, Store, flip};

/// How a file is read.
#[derive(Clone, Copy, Debug)]
enum How {
    /// From its beginning to its end, so that the kernel reads ahead.
    Through,
    /// By one large read.
    AtOnce,
    /// Small pieces, the last one first.
    Backwards,
}

fn read(path: &Path, how: How) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len() as usize;
    let mut bytes = vec![0; len];
    match how {
        How::Through => return fs::read(path),
        How::AtOnce => file.read_exact_at(&mut bytes, 0)?,
        How::Backwards => {
            for at in (0..len.div_ceil(10_000)).rev().map(|it| it * 10_000) {
                let end = len.min(at + 10_000);
                file.read_exact_at(&mut bytes[at..end], at as u64)?;
            }
        }
    }
    Ok(bytes)
}

/// Reads every file of every run: those that failed are just these, and the rest is right.
#[track_caller]
fn assert_fails_just_in(store: &Store, mount: &Mount, affected: &Affected, what: &str) {
    let hows = [How::Through, How::AtOnce, How::Backwards];
    let mut number = 0;
    for (run, tree) in &store.runs {
        for (path, node) in tree.0.iter().filter(|it| it.1.kind == "file") {
            let how = hows[number % hows.len()];
            number += 1;
            let what = format!("{what}: {:?} of run {run}, {how:?}", path_of(path));
            let got = read(&mount.run(*run).join(path_of(path)), how);
            if affected.get(path).is_some_and(|it| it.contains(run)) {
                let code = got.err().and_then(|e| e.raw_os_error());
                assert_eq!(code, Some(libc::EIO), "{what}");
            } else {
                let bytes = got.unwrap_or_else(|e| panic!("{what}: {e}: {}", mount.log()));
                assert!(blake3::hash(&bytes).as_bytes()[..] == node.content[..], "{what}");
            }
        }
    }
}

/// The log says which block is at fault, and which files could not be read for it.
#[track_caller]
fn assert_logged(mount: &Mount, block: &Path, affected: &Affected) {
    let log = mount.log();
    assert!(log.contains(block.file_name().unwrap().to_str().unwrap()), "{log}");
    // A version that has several names is told of by one of them.
    let named: BTreeSet<&Vec<u8>> = affected
        .keys()
        .filter(|path| log.contains(&raidtape::error::Quoted(path).to_string()))
        .collect();
    assert!(!named.is_empty() && named.len() + 2 >= affected.len(), "{named:?}, {log}");
}

fn damage_heals(init: &[&str], seed: u64) {
    let store = Store::new(init);
    let mut seeded = data::Seeded::new(seed);
    for (number, (mode, options)) in MODES.iter().enumerate() {
        for (kind, harm) in ["flipped", "cut", "missing"].into_iter().enumerate() {
            let (block, len) = store.block(number + 2 * kind);
            let whole = fs::read(&block).unwrap();
            let at = seeded.below(len);
            let affected = match harm {
                "flipped" => {
                    flip(&block, at);
                    store.affected(&block, at, at + 1)
                }
                "cut" => {
                    fs::write(&block, &whole[..at as usize]).unwrap();
                    store.affected(&block, at, len)
                }
                _ => {
                    fs::remove_file(&block).unwrap();
                    store.affected(&block, 0, len)
                }
            };
            let what = format!("seed {seed}, mounted {mode}, block {harm} at {at} of {len}");
            let mount = Mount::start(&store.sandbox, options);
            assert_fails_just_in(&store, &mount, &affected, &what);
            if !affected.is_empty() {
                assert_logged(&mount, &block, &affected);
            }
            // It comes back as another file, as a copy from elsewhere does.
            let copy = store.sandbox.path("copy");
            fs::write(&copy, &whole).unwrap();
            fs::rename(&copy, &block).unwrap();
            assert_fails_just_in(&store, &mount, &Affected::new(), &format!("after {what}"));
            mount.end();
        }
    }
    store.sandbox.assert_valid();
}

#[test]
fn damage_is_eio_for_its_files_and_heals_zstd() {
    damage_heals(&[], crate::common::program::seed());
}

#[test]
fn damage_is_eio_for_its_files_and_heals_uncompressed() {
    damage_heals(&["--compression", "none"], crate::common::program::seed());
}

#[test]
fn a_damaged_block_is_not_left_to_the_kernel() {
    let sandbox = Sandbox::with(&["--compression", "none"]);
    let path = sandbox.source.join("file");
    data::noise_file(&path, 220, 700_000);
    sandbox.backup();
    // The block is the file, so the kernel could read it by itself.
    let (block, len) = sandbox.blocks("volume").pop().unwrap();
    let whole = fs::read(&path).unwrap();
    assert_eq!(len, 700_000);
    for (mode, options) in MODES {
        flip(&block, 500_000);
        let mount = Mount::start(&sandbox, options);
        let shown = mount.run(1).join("file");
        let failed = fs::read(&shown).expect_err(mode);
        assert_eq!(failed.raw_os_error(), Some(libc::EIO), "mounted {mode}");
        // The whole block is checked once, not at each open.
        fs::read(&shown).expect_err(mode);
        let checks = mount.log().matches("are read frame by frame").count();
        assert_eq!(checks, usize::from(options.contains(&"passthrough")), "{}", mount.log());
        flip(&block, 500_000);
        assert!(fs::read(&shown).expect(mode) == whole, "mounted {mode}");
        // What the kernel had is not what it gets once another file is in its place. Whether it
        // asks before is the kernel's choice: what it has read, it need not read again.
        flip(&block, 500_000);
        let _ = fs::read(&shown);
        let good = sandbox.path("good");
        fs::write(&good, &whole).unwrap();
        fs::rename(&good, &block).unwrap();
        assert!(fs::read(&shown).expect(mode) == whole, "put back, mounted {mode}");
        mount.end();
    }
}
