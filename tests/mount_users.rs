//! Who may read what in a mount.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::common::{Mount, NOBODY, Sandbox, args, need_root, run, tool};

/// What nobody gets by a command of the shell on a path.
fn as_nobody(line: &str, path: &Path) -> Result<String, String> {
    let mut command = Command::new("sh");
    command.args(["-c", line, "sh"]).arg(path).env("LC_ALL", "C").current_dir("/");
    let output = command.uid(NOBODY).gid(NOBODY).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

/// A source with files for everybody and for some.
fn guarded(sandbox: &Sandbox) {
    let at = |name: &str| sandbox.source.join(name);
    let mode = |name: &str, mode| fs::set_permissions(at(name), Permissions::from_mode(mode));
    for name in ["closed dir", "listed dir"] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("inside"), "inside").unwrap();
        mode(&format!("{name}/inside"), 0o644).unwrap();
    }
    for name in ["open", "closed", "of nobody", "by list", "by group"] {
        fs::write(at(name), name).unwrap();
        mode(name, 0o600).unwrap();
    }
    mode("open", 0o644).unwrap();
    mode("closed dir", 0o700).unwrap();
    mode("listed dir", 0o744).unwrap();
    chown(at("of nobody"), Some(NOBODY), Some(0)).unwrap();
    chown(at("by group"), Some(0), Some(NOBODY)).unwrap();
    mode("by group", 0o640).unwrap();
    tool("setfacl", args!["-m", &format!("u:{NOBODY}:r"), &at("by list")]);
    mode("", 0o755).unwrap();
}

#[test]
fn others_are_kept_out_unless_they_are_let_in() {
    need_root("it acts as another user");
    let sandbox = Sandbox::new();
    guarded(&sandbox);
    sandbox.backup();
    let mount = sandbox.mount();
    for path in [mount.point.clone(), mount.run(1), mount.run(1).join("open"), mount.ctl("status")]
    {
        let said = as_nobody("ls -d \"$1/\" || cat \"$1\"", &path).unwrap_err();
        assert!(said.contains("Permission denied"), "{said}");
    }
    mount.end();
}

#[test]
fn users_that_are_let_in_have_the_rights_of_the_source() {
    need_root("it acts as another user");
    let sandbox = Sandbox::new();
    guarded(&sandbox);
    sandbox.backup();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    let at = |name: &str| mount.run(1).join(name);
    for name in ["open", "of nobody", "by list", "by group"] {
        assert_eq!(as_nobody("cat \"$1\"", &at(name)).as_deref(), Ok(name));
    }
    assert_eq!(as_nobody("ls \"$1\"", &at("listed dir")).as_deref(), Ok("inside\n"));
    let denied = [
        ("cat \"$1\"", at("closed")),
        ("ls \"$1\"", at("closed dir")),
        ("cat \"$1\"", at("closed dir/inside")),
        ("cat \"$1\"", at("listed dir/inside")),
        ("ls \"$1\"", mount.point.join("ingest")),
        ("echo > \"$1/new\"", mount.point.join("ingest")),
        ("cat \"$1\"", mount.ctl("backup")),
        ("echo ingest > \"$1\"", mount.ctl("backup")),
    ];
    for (line, path) in denied {
        let said = as_nobody(line, &path).expect_err(path.to_str().unwrap());
        assert!(said.contains("ermission denied"), "{line} {path:?}: {said}");
    }
    assert!(as_nobody("cat \"$1\"", &mount.ctl("status")).is_ok());
    // Nor may somebody change what is his own.
    let said = as_nobody("echo > \"$1\"", &at("of nobody")).unwrap_err();
    assert!(said.contains("Read-only file system"), "{said}");
    mount.end();
}

#[test]
fn an_access_list_that_comes_later_lets_nobody_in() {
    need_root("it acts as another user");
    let sandbox = Sandbox::new();
    let file = sandbox.source.join("file");
    fs::write(&file, "file").unwrap();
    chown(&file, Some(0), Some(NOBODY)).unwrap();
    for (path, mode) in [(&file, 0o640), (&sandbox.source, 0o755)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    sandbox.backup();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    assert_eq!(as_nobody("cat \"$1\"", &mount.run(1).join("file")).as_deref(), Ok("file"));
    // The mode's bits of the group are now the list's mask: the group itself has no right.
    tool("setfacl", args!["-m", "g::-,u:1234:r", &file]);
    sandbox.backup();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let path = mount.run(2).join("file");
    assert_eq!((mode(&file), mode(&path)), (0o100_640, 0o100_600));
    let said = as_nobody("cat \"$1\"", &path).unwrap_err();
    assert!(said.contains("ermission denied"), "{said}");
    assert_eq!(as_nobody("cat \"$1\"", &mount.run(1).join("file")).as_deref(), Ok("file"));
    mount.end();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    let path = mount.run(2).join("file");
    assert_eq!(mode(&path), 0o100_640);
    let said = as_nobody("cat \"$1\"", &path).unwrap_err();
    assert!(said.contains("ermission denied"), "{said}");
    mount.end();
}

#[test]
fn programs_of_a_run_keep_their_owners_rights_where_root_mounts() {
    need_root("it acts as another user");
    let sandbox = Sandbox::new();
    let program = sandbox.source.join("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(&sandbox.source, Permissions::from_mode(0o755)).unwrap();
    sandbox.backup();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    let path = mount.run(1).join("id");
    let mut command = Command::new(&path);
    let said = run(command.arg("-u").uid(NOBODY).gid(NOBODY)).code(0).text();
    assert_eq!(said, "0\n");
    // Whoever does not want that says so to the kernel.
    let target = tool("findmnt", args!["-no", "TARGET", "-T", &path]).text();
    tool("mount", ["-i", "-o", "remount,bind,nosuid,nodev", target.trim()]);
    let mut command = Command::new(&path);
    let said = run(command.arg("-u").uid(NOBODY).gid(NOBODY)).code(0).text();
    assert_eq!(said, format!("{NOBODY}\n"));
    mount.end();
}
