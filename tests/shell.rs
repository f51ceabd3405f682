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
            // What a program asks itself to do is nothing to offer.
            assert!(!script.contains("probe"), "{name} {shell}");
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

/// Everything below a directory, sorted, with where links lead.
fn below(dir: &Path) -> Vec<String> {
    let list = tool("find", args![dir, "!", "-type", "d", "-printf", "%M %P %l\\n"]).text();
    let mut lines: Vec<String> = list.lines().map(|it| it.trim_end().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn what_is_installed_is_complete_and_in_its_place() {
    let sandbox = Sandbox::bare();
    // The programs are built already, but not for a release.
    let bin = sandbox.path("bin");
    fs::create_dir_all(sandbox.path("release")).unwrap();
    fs::create_dir(&bin).unwrap();
    for (name, program) in programs() {
        let link = sandbox.path("release").join(name);
        std::os::unix::fs::symlink(program.get_program(), link).unwrap();
    }
    let cargo = format!(
        "#!/bin/sh\n[ \"$1\" = build ] || echo '{{\"target_directory\":\"{}\"}}'\n",
        sandbox.path("").to_str().unwrap().trim_end_matches('/')
    );
    fs::write(bin.join("cargo"), cargo).unwrap();
    tool("chmod", args!["755", &bin.join("cargo")]);
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let install = |line: &[&str]| {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install"));
        command.args(line).env("PATH", &path).env("CARGO_HOME", "/nonexistent");
        run(command.stdin(std::process::Stdio::null()))
    };
    let destination = sandbox.path("to");
    let to = destination.to_str().unwrap();
    let planned = install(&["--destdir", to, "--prefix", "/usr", "--dry-run"]).code(0).text();
    assert!(!destination.exists());
    install(&["--destdir", to, "--prefix", "/usr"]).code(0);
    let files = below(&destination);
    let mut expected = Vec::new();
    for name in ["raidtape", "mountctl"] {
        expected.push(format!("-rwxr-xr-x usr/bin/{name}"));
        for place in [
            format!("bash-completion/completions/{name}"),
            format!("zsh/site-functions/_{name}"),
            format!("fish/vendor_completions.d/{name}.fish"),
            format!("man/man1/{name}.1"),
            format!("man/man1/{name}-umount.1"),
        ] {
            expected.push(format!("-rw-r--r-- usr/share/{place}"));
        }
    }
    for name in ["genmeta", "rebuildmeta"] {
        expected.push(format!("lrwxrwxrwx usr/bin/raidtape-{name} raidtape"));
    }
    let verbs = "p ck eject find job label load move queue read reset scan seek stat tapes tell \
                 watch write";
    for name in verbs.split(' ').map(|it| format!("t0{it}")) {
        expected.push(format!("lrwxrwxrwx usr/bin/{name} raidtape"));
    }
    for helper in ["mount.raidtape", "umount.raidtape"] {
        expected.push(format!("-rw-r--r-- usr/share/man/man8/{helper}.8"));
        let by_type = helper.replace('.', ".fuse.");
        for name in [helper, &by_type] {
            expected.push(format!("lrwxrwxrwx sbin/{name} /usr/bin/mountctl"));
        }
    }
    let unit = "etc/systemd/system/raidtape-mount@.service";
    expected.push(format!("-rw-r--r-- {unit}"));
    for line in &expected {
        assert!(files.contains(line), "{line}: {files:#?}");
        let place = line.split(' ').nth(1).unwrap();
        assert!(place.contains("/man/") || planned.contains(place), "{place}: {planned}");
    }
    // The rest are pages of the commands.
    let others: Vec<_> = files.iter().filter(|it| !expected.contains(it)).collect();
    assert!(others.iter().all(|it| it.contains(" usr/share/man/man1/")), "{others:?}");
    assert!(others.len() > 15, "{others:?}");
    let unit = fs::read_to_string(destination.join(unit)).unwrap();
    assert!(unit.contains("\nExecStart=/usr/bin/raidtape ") && !unit.contains("/usr/local"));
    assert!(unit.contains("\nExecStop=-/usr/bin/mountctl umount "), "{unit}");
    let script = destination.join("usr/share/bash-completion/completions/mountctl");
    assert_eq!(offers(&script, &["mountctl", "stat"]), ["status"]);
    // Over what is there, the same once more.
    install(&["--destdir", to, "--prefix", "/usr"]).code(0);
    assert_eq!(below(&destination), files);
    install(&["--prefix", "usr"]).code(2);
    install(&["--what"]).code(2);
}
