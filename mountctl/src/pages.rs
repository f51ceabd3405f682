//! Completions for shells and manual pages, made from the definition of the arguments.

use std::fs;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::print;
use crate::failure::Failure;
use crate::mount8::Form;
use crate::shown::shown_bytes;

/// Prints a completion script.
pub fn completions(mut definition: Command, shell: Shell) -> Result<(), Failure> {
    let name = definition.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut definition, name, &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Prints the program's page, or writes all pages into a directory.
pub fn man(definition: Command, directory: Option<&Path>) -> Result<(), Failure> {
    let Some(directory) = directory else {
        let mut page = Vec::new();
        return match Man::new(definition).render(&mut page) {
            Ok(()) => print(&String::from_utf8_lossy(&page)),
            Err(error) => Err(Failure::system(shown_bytes(error.to_string().as_bytes()))),
        };
    };
    let pages = || {
        fs::create_dir_all(directory)?;
        clap_mangen::generate_to(definition, directory)?;
        for form in [Form::Mount, Form::Umount] {
            Man::new(form.definition()).section("8").generate_to(directory)?;
        }
        Ok(())
    };
    pages().map_err(|error| Failure::on_path("write pages to", directory, &error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    fn check(command: &Command, page: &str) {
        let page = page.replace("\\-", "-");
        for argument in command.get_arguments().filter(|it| !it.is_hide_set()) {
            let long = argument.get_long().map(|it| format!("--{it}"));
            let short = argument.get_short().map(|it| format!("-{it}"));
            for name in [long, short].into_iter().flatten() {
                assert!(page.contains(&name), "{name} in the page of {}", command.get_name());
            }
            assert!(argument.get_help().is_some(), "{} has no help", argument.get_id());
        }
    }

    #[test]
    fn every_command_and_option_has_its_place_in_the_pages() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let definition = crate::cli::definition();
        man(definition.clone(), Some(directory.path())).unwrap();
        check(&definition, &read("mountctl.1"));
        let shown: Vec<_> = definition.get_subcommands().filter(|it| !it.is_hide_set()).collect();
        for command in &shown {
            check(command, &read(&format!("mountctl-{}.1", command.get_name())));
        }
        for form in [Form::Mount, Form::Umount] {
            let definition = form.definition();
            check(&definition, &read(&format!("{}.8", definition.get_name())));
        }
        assert!(read("mount.raidtape.8").contains("allow_other"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), shown.len() + 3);
    }
}
