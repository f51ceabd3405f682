//! The command line: arguments, output, progress bars, exit codes.
//!
//! The only room that prints. Formats are not known here; what a command does is a call of another
//! room, what it says is in `show`.

mod args;
mod bar;
mod commands;
mod coverage;
mod exit;
mod mount;
mod notify;
mod pages;
mod place;
mod query;
mod rebuild;
mod register;
mod repair;
mod report;
mod restore;
mod show;
mod t0p;
mod tape;
mod terminal;
mod volumes;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Parser;

use args::{Args, Command};
pub use exit::exit_code_of_job;

/// Runs the program with the arguments of this process; gives the exit code.
pub fn main() -> u8 {
    let mut words = std::env::args_os();
    if words.next().is_some_and(|it| it == place::PROBE) {
        return place::probe(Path::new(&words.next().unwrap_or_default()));
    }
    let line: Vec<OsString> = std::env::args_os().collect();
    if let Some(words) = t0p::words(&line) {
        return t0p::main(words);
    }
    let args = match Args::try_parse_from(words_of_line(std::env::args_os())) {
        Ok(args) => args,
        Err(e) => {
            // Clap knows which of its answers are errors; a closed pipe is nobody's loss.
            let _ = e.print();
            return if e.use_stderr() { exit::USAGE } else { exit::DONE };
        }
    };
    start_log(&args);
    match run(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("raidtape: {e}");
            exit::of_kind(e.kind())
        }
    }
}

/// The arguments, with the command among them that the program's name stands for: called
/// `raidtape-genmeta`, it is `raidtape genmeta`.
fn words_of_line(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<OsString> = words.collect();
    let name = words.first().map(Path::new).and_then(Path::file_name).and_then(OsStr::to_str);
    let command = name.and_then(|it| it.strip_prefix("raidtape-"));
    if let Some(command) = command.filter(|it| ["genmeta", "rebuildmeta"].contains(it)) {
        let command = OsString::from(command);
        words.insert(1, command);
    }
    words
}

fn start_log(args: &Args) {
    // Problems are printed as results; the log is for what happens behind them.
    let level = match (&args.command, args.verbose) {
        (Command::Mount(_), 0) => "info,fuser=error",
        (_, 0) => "error",
        (_, 1) => "info",
        _ => "debug",
    };
    let env = env_logger::Env::default().filter_or("RAIDTAPE_LOG", level);
    env_logger::Builder::from_env(env).format_target(false).init();
}

fn run(args: &Args) -> crate::error::Result<u8> {
    let catalog = args.catalog()?;
    match &args.command {
        Command::Init(it) => commands::init(&catalog, it),
        Command::SetCopies(it) => volumes::set_copies(&catalog, it),
        Command::AddVolume(it) => commands::add_volume(&catalog, it),
        Command::Backup(it) => commands::backup(&catalog, it, args.verbose > 0),
        Command::ListChanges(it) => commands::list_changes(&catalog, it),
        Command::Diff(it) => query::diff(&catalog, it),
        Command::Find(it) => query::find(&catalog, it),
        Command::Stats(it) => query::stats(&catalog, it),
        Command::Dump(it) => query::dump(&catalog, it),
        Command::DumpCatalog(_) => query::dump_catalog(&catalog),
        Command::Validate(it) => commands::validate(&catalog, it),
        Command::Genmeta(it) => commands::genmeta(&catalog, it),
        Command::Rebuildmeta(it) => rebuild::rebuildmeta(&catalog, it),
        Command::RebuildCatalog(it) => register::rebuild_catalog(&catalog, it),
        Command::CatalogRestore(it) => rebuild::catalog_restore(&catalog, it),
        Command::Restore(it) => restore::restore(&catalog, it),
        Command::RestoreFolder(it) => restore::restore_folder(&catalog, it),
        Command::RevertToRun(it) => restore::revert_to_run(&catalog, it),
        Command::Runs(it) => commands::runs(&catalog, it),
        Command::Volumes(it) => volumes::volumes(&catalog, it),
        Command::Replicate(it) => volumes::replicate(&catalog, it),
        Command::Coverage(it) => coverage::coverage(&catalog, it),
        Command::Ls(it) => commands::ls(&catalog, it),
        Command::Tape(it) => tape::tape(&catalog, it, args.verbose > 0),
        Command::Mount(it) => mount::mount(&catalog, it),
        Command::Umount(it) => mount::umount(it),
        Command::Completions(it) => pages::completions(it),
        Command::Man(it) => pages::man(it),
    }
}
