//! Completions and manual pages: what shells and readers make of them.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::{RAIDTAPE, Sandbox, args, mountctl, run, tool};

/// Both programs, by name.
fn programs() -> [(&'static str, Command); 2] {
    [("raidtape", Command::new(RAIDTAPE)), ("mountctl", mountctl())]
}

/// What bash offers for the last of these words.
fn offers(script: &Path, words: &[&str]) -> Vec<String> {
    let code = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1))\n\
                cur=${COMP_WORDS[COMP_CWORD]}\n\
                # As readline does it: the function that was registered for the program.\n\
                fn=$(complete -p \"$1\" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n\
                \"$fn\" \"$1\" \"$cur\" \"${COMP_WORDS[COMP_CWORD-1]}\"\n\
                printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut line = args!["-c", code, "bash", script].to_vec();
    line.extend(words.iter().map(Into::into));
    tool("bash", line).text().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_options() {
    let sandbox = Sandbox::bare();
    for (name, mut program) in programs() {
        let script = sandbox.path(name);
        fs::write(&script, run(program.args(["completions", "bash"])).code(0).bytes()).unwrap();
        tool("bash", args!["-n", &script]);
        assert_eq!(offers(&script, &[name, "umo"]), ["umount"]);
        assert!(offers(&script, &[name, "mount", "-"]).contains(&"-o".to_owned()));
    }
    let script = sandbox.path("raidtape");
    assert_eq!(offers(&script, &["raidtape", "mount", "--allow"]), ["--allow-other"]);
    let words = offers(&script, &["raidtape", "restore", "--overwrite", "if"]);
    assert_eq!(words, ["if-changed", "if-newer"]);
    let script = sandbox.path("mountctl");
    assert_eq!(offers(&script, &["mountctl", "status", "--j"]), ["--json"]);
}

#[test]
fn every_shell_gets_a_script_and_others_an_error() {
    for (name, _) in programs() {
        for shell in ["bash", "zsh", "fish"] {
            let (_, mut program) = programs().into_iter().find(|it| it.0 == name).unwrap();
            let script = run(program.args(["completions", shell])).code(0).text();
            assert!(script.contains(name) && script.contains("umount"), "{name} {shell}");
        }
        let (_, mut program) = programs().into_iter().find(|it| it.0 == name).unwrap();
        run(program.args(["completions", "csh"])).code(2);
    }
}

#[test]
fn pages_are_written_for_all_commands() {
    let sandbox = Sandbox::bare();
    let pages = sandbox.path("man");
    for (name, mut program) in programs() {
        run(program.arg("man").arg(&pages)).code(0);
        let (_, mut program) = programs().into_iter().find(|it| it.0 == name).unwrap();
        let page = run(program.arg("man")).code(0).text();
        assert!(page.contains(&format!(".TH {name} 1")), "{page}");
    }
    let names = ["raidtape.1", "raidtape-mount.1", "mountctl-status.1", "mount.raidtape.8"];
    for name in names {
        let text = fs::read_to_string(pages.join(name)).unwrap();
        assert!(text.contains(".SH OPTIONS"), "{name}");
    }
    let helper = fs::read_to_string(pages.join("mount.raidtape.8")).unwrap();
    for option in ["noexec", "allow_other", "cache_size=", "_netdev"] {
        assert!(helper.contains(option), "{option}");
    }
    // A place that cannot be one is an error.
    fs::write(sandbox.path("file"), "").unwrap();
    run(Command::new(RAIDTAPE).arg("man").arg(sandbox.path("file/x"))).code(1);
}
