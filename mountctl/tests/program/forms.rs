//! The command line in both forms: arguments, messages and exit codes.
//!
//! Invariant: nothing here needs a mount or the permission to make one.

use std::ffi::OsStr;
use std::fs;

use crate::scene::{GOOD, Scene, assert_code, stderr, stdout};

#[test]
fn mountctl_tells_wrong_usage_by_code_2() {
    let scene = Scene::new(GOOD);
    for line in [[].as_slice(), &["mount"], &["mount", "a"], &["nonsense"]] {
        let output = scene.mountctl().args(line).output().unwrap();
        assert_code(&output, 2);
    }
    let output = scene.mount("rw,sync");
    assert_code(&output, 2);
    assert!(stderr(&output).contains("`sync`"));
    assert_code(&scene.mount("remount,ro"), 2);
    assert!(!scene.path("pid").exists());
}

#[test]
fn help_and_version_are_no_errors() {
    let scene = Scene::new(GOOD);
    assert_code(&scene.mountctl().arg("--help").output().unwrap(), 0);
    assert_code(&scene.mountctl().arg("--version").output().unwrap(), 0);
    assert_code(&scene.helper(&["--help"]), 0);
    let output = scene.mountctl().arg("--help").output().unwrap();
    assert!(!stdout(&output).contains("probe"));
    assert!(stdout(&scene.helper(&["--help"])).contains("allow_other"));
}

#[test]
fn the_helper_mounts_with_arguments_in_any_order() {
    let lines: [&[&str]; 3] = [
        &["CATALOG", "POINT", "-o", "rw,allow_other"],
        &["-n", "-o", "rw", "-o", "allow_other", "CATALOG", "POINT"],
        &["CATALOG", "-t", "fuse.raidtape", "POINT", "-wno", "ro,allow_other"],
    ];
    for line in lines {
        let scene = Scene::new(GOOD);
        let words: Vec<&OsStr> = line
            .iter()
            .map(|word| match *word {
                "CATALOG" => scene.catalog.as_os_str(),
                "POINT" => scene.mountpoint.as_os_str(),
                other => OsStr::new(other),
            })
            .collect();
        let output = scene.helper(&words);
        assert_code(&output, 0);
        assert_eq!(stderr(&output), "");
        let arguments = fs::read_to_string(scene.path("arguments")).unwrap();
        assert!(arguments.ends_with("--foreground\n--allow-other\n"), "{arguments}");
    }
}

#[test]
fn the_helper_has_the_codes_of_mount8() {
    let scene = Scene::new("echo 'raidtape: locked' >&2\nexit 11\n");
    let (catalog, point) = (scene.catalog.as_os_str(), scene.mountpoint.as_os_str());
    let word = OsStr::new;
    assert_code(&scene.helper::<&str>(&[]), 1);
    assert_code(&scene.helper(&[catalog]), 1);
    assert_code(&scene.helper(&[catalog, point, word("extra")]), 1);
    assert_code(&scene.helper(&[catalog, point, word("-o"), word("remount")]), 1);
    assert_code(&scene.helper(&[catalog, point, word("-t"), word("ext4")]), 1);
    assert_code(&scene.helper(&[catalog, point, word("-N"), word("/proc/1/ns/mnt")]), 1);
    assert!(!scene.path("pid").exists());
    let output = scene.helper(&[catalog, point]);
    assert_code(&output, 32);
    let text = stderr(&output);
    assert!(text.starts_with("mount.raidtape: cannot mount"), "{text}");
    assert!(text.contains("raidtape: locked"), "{text}");
    assert_code(&scene.helper(&[word("absent"), point]), 32);
    assert_code(&scene.helper(&[catalog, word("absent")]), 32);
    assert_code(&scene.helper(&[catalog, catalog]), 32);
    fs::remove_file(&scene.daemon).unwrap();
    assert_code(&scene.helper(&[catalog, point]), 2);
}

#[test]
fn a_sloppy_helper_accepts_unknown_options() {
    let scene = Scene::new(GOOD);
    let (catalog, point) = (scene.catalog.as_os_str(), scene.mountpoint.as_os_str());
    let option = [OsStr::new("-o"), OsStr::new("bogus")];
    let output = scene.helper(&[catalog, point, option[0], option[1]]);
    assert_code(&output, 1);
    assert!(stderr(&output).contains("`bogus`"));
    let sloppy = OsStr::new("-s");
    let output = scene.helper(&[catalog, point, sloppy, option[0], option[1]]);
    assert_code(&output, 0);
}

#[test]
fn a_fake_helper_checks_and_starts_nothing() {
    let scene = Scene::new(GOOD);
    let (catalog, point) = (scene.catalog.as_os_str(), scene.mountpoint.as_os_str());
    let output = scene.helper(&[OsStr::new("-fv"), catalog, point]);
    assert_code(&output, 0);
    assert!(stderr(&output).contains("would mount"));
    assert!(!scene.path("pid").exists());
    assert!(!scene.path("cat alog.mount.log").exists());
    let absent = OsStr::new("absent");
    assert_code(&scene.helper(&[OsStr::new("-f"), absent, point]), 32);
    assert_code(&scene.helper(&[OsStr::new("-f"), catalog, absent]), 32);
}

#[test]
fn asking_for_what_is_not_mounted_fails() {
    let scene = Scene::new(GOOD);
    for command in ["status", "umount"] {
        let mut line = scene.mountctl();
        let output = line.arg(command).arg(&scene.mountpoint).output().unwrap();
        assert_code(&output, 1);
        assert!(stderr(&output).contains("mount point is not mounted"));
        let output = scene.mountctl().args([command, "absent"]).output().unwrap();
        assert_code(&output, 1);
    }
    let mut helper = scene.called("/sbin/umount.fuse.raidtape");
    let output = helper.arg(&scene.mountpoint).args(["-t", "fuse.raidtape"]).output().unwrap();
    assert_code(&output, 32);
    assert!(stderr(&output).starts_with("umount.raidtape: "));
    assert_code(&scene.called("umount.raidtape").output().unwrap(), 1);
    let output = scene.mountctl().args(["umount", "/proc"]).output().unwrap();
    assert_code(&output, 1);
    assert!(stderr(&output).contains("type proc"));
}

#[test]
fn the_list_of_mounts_is_an_array() {
    let scene = Scene::new(GOOD);
    let output = scene.mountctl().args(["status", "--json"]).output().unwrap();
    assert_code(&output, 0);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value.is_array());
    let output = scene.mountctl().arg("status").output().unwrap();
    assert_code(&output, 0);
    assert!(stdout(&output).starts_with("CATALOG "));
}

#[test]
fn a_job_is_written_to_the_control_file_as_one_quoted_line() {
    let scene = Scene::new(GOOD);
    let controls = scene.mountpoint.join(".ctl");
    fs::create_dir(&controls).unwrap();
    fs::write(controls.join("status"), "{}").unwrap();
    fs::write(controls.join("backup"), "").unwrap();
    let mut command = scene.mountctl();
    command.args(["backup", "--detach", "--mount"]);
    command.arg(&scene.mountpoint).args(["--", "so urce", "--tag", "it's"]);
    // A plain file gives back the line and not a job, which must not pass for success.
    let output = command.output().unwrap();
    assert_code(&output, 1);
    assert!(stderr(&output).contains("names no job"), "{}", stderr(&output));
    let line = fs::read_to_string(controls.join("backup")).unwrap();
    let source = scene.path("so urce").display().to_string();
    assert_eq!(line, format!("'{source}' --tag 'it'\\''s'\n"));
}

#[test]
fn a_backup_needs_a_mount_and_a_source() {
    let scene = Scene::new(GOOD);
    let mut command = scene.mountctl();
    command.arg("backup").arg("--mount").arg(&scene.mountpoint).arg("/a");
    let output = command.output().unwrap();
    assert_code(&output, 1);
    assert!(stderr(&output).contains("not a mounted catalog"));
    let output = scene.mountctl().args(["backup", "--tag", "x"]).output().unwrap();
    assert_code(&output, 2);
    assert!(stderr(&output).contains("source before the options"));
}
