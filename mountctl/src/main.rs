//! Mount helper of RaidTape, under several names: `mountctl` for people and scripts,
//! `mount.raidtape` and `umount.fuse.raidtape` for mount(8), umount(8) and fstab.
//!
//! Invariant: this program shares no code with the daemon. It knows only the daemon's command
//! line, /proc/self/mountinfo, and the files below `.ctl` of the mount.

mod backup;
mod cli;
mod control;
mod daemon;
mod failure;
mod jobs;
mod mount8;
mod mounts;
mod options;
mod pages;
mod probe;
mod shown;
mod status;
mod target;
mod unmount;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    if let [name, point] = arguments.as_slice()
        && name == probe::NAME
    {
        return probe::answer(Path::new(point));
    }
    match mount8::Form::of(arguments.first()) {
        Some(form) => mount8::main(form, arguments),
        None => cli::main(arguments),
    }
}
