//! Small file systems of their own, on loop devices.

use std::fs::{self, File};
use std::path::PathBuf;

use super::{Sandbox, args, mount, need_root, tool};

/// A small file system of its own; unmounted with the test, and its loop device with it.
pub struct Disk {
    pub point: PathBuf,
}

impl Disk {
    /// An ext4 file system of `mib` MiB, mounted at `name` in the sandbox.
    pub fn ext4(sandbox: &Sandbox, name: &str, mib: u64) -> Disk {
        Disk::new(sandbox, name, mib, &["mkfs.ext4", "-q", "-F", "-m", "0"])
    }

    /// Any file system: `make` is the command that makes it on the image.
    pub fn new(sandbox: &Sandbox, name: &str, mib: u64, make: &[&str]) -> Disk {
        need_root("it mounts small file systems");
        let (image, point) = (sandbox.path(&format!("{name}.img")), sandbox.path(name));
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let mut line: Vec<std::ffi::OsString> = make[1..].iter().map(Into::into).collect();
        line.push(image.clone().into());
        tool(make[0], line);
        fs::create_dir(&point).unwrap();
        let disk = Disk { point };
        tool("mount", args!["-o", "loop", &image, &disk.point]);
        disk
    }

    pub fn free(&self) -> u64 {
        let it = rustix::fs::statvfs(&self.point).unwrap();
        it.f_bavail * it.f_frsize
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The loop device was made by mount and goes with the mount.
        if mount::is_mount_point(&self.point) {
            let flags = rustix::mount::UnmountFlags::empty();
            if rustix::mount::unmount(&self.point, flags).is_err() {
                mount::detach(&self.point);
            }
        }
    }
}
