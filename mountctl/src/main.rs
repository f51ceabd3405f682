//! Mount helper of RaidTape, under two names: `mountctl` for people and scripts, and
//! `mount.raidtape` for mount(8) and fstab.
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
mod probe;
mod shown;
mod status;
mod target;
mod unmount;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    if mount8::is_called_so(arguments.first()) {
        mount8::main(arguments)
    } else {
        cli::main(arguments)
    }
}
