//! Completions for shells and manual pages, made from the definition of the arguments.

use std::path::Path;

use clap::CommandFactory;

use super::show::Out;
use super::{args, exit};
use crate::error::{Error, Result};
use crate::sys::quoted;

/// The program's definition, as help, completions and pages have it.
fn definition() -> clap::Command {
    args::Args::command()
}

pub fn completions(args: &args::Completions) -> Result<u8> {
    let mut out = Out::new();
    let mut definition = definition();
    let name = definition.get_name().to_owned();
    clap_complete::generate(args.shell, &mut definition, name, &mut out);
    out.finish()?;
    Ok(exit::DONE)
}

pub fn man(args: &args::Man) -> Result<u8> {
    match &args.dir {
        Some(dir) => write_pages(dir)?,
        None => {
            let mut out = Out::new();
            let page = clap_mangen::Man::new(definition());
            page.render(&mut out).map_err(|e| Error::io("writing to standard output", e))?;
            out.finish()?;
        }
    }
    Ok(exit::DONE)
}

fn write_pages(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(definition(), dir))
        .map_err(|e| Error::io(format!("writing pages to {}", quoted(dir)), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(command: &clap::Command, name: &str, dir: &Path) -> usize {
        let page = std::fs::read_to_string(dir.join(format!("{name}.1"))).unwrap();
        let page = page.replace("\\-", "-");
        for arg in command.get_arguments().filter(|it| !it.is_hide_set()) {
            if let Some(long) = arg.get_long() {
                assert!(page.contains(&format!("--{long}")), "--{long} in the page of {name}");
            }
            if let Some(short) = arg.get_short() {
                assert!(page.contains(&format!("-{short}")), "-{short} in the page of {name}");
            }
            assert!(arg.get_help().is_some(), "{name} {} has no help", arg.get_id());
        }
        let shown = command.get_subcommands().filter(|it| !it.is_hide_set());
        let pages = shown.map(|it| {
            assert!(page.contains(it.get_name()), "{} in the page of {name}", it.get_name());
            check(it, &format!("{name}-{}", it.get_name()), dir)
        });
        1 + pages.sum::<usize>()
    }

    #[test]
    fn every_command_and_option_has_its_place_in_the_pages() {
        let dir = tempfile::tempdir().unwrap();
        write_pages(dir.path()).unwrap();
        let pages = check(&definition(), "raidtape", dir.path());
        assert_eq!(pages, std::fs::read_dir(dir.path()).unwrap().count());
        assert!(pages >= 20, "{pages}");
    }
}
