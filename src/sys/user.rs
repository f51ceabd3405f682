//! Acting for somebody else: creating files that belong to a caller from their first moment.
//!
//! The identity changed is one thread's, and it is changed back however the call ends.

use std::io;

/// Whether permissions bind a thread that acts as somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// They do, as far as user and main group tell: the further groups are this process's own.
    Checked,
    /// They do not, somebody else has checked; other privileges are given up all the same.
    Assumed,
}

/// Runs `call` as another user and group in the eyes of the file system, so that what it creates
/// is theirs from its first moment, by the kernel's own rules. Only for a process that runs as
/// root; it holds for this thread alone, and ends with the call.
pub fn as_user<T, E: From<io::Error>>(
    uid: u32,
    gid: u32,
    rights: Rights,
    call: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let own = ThreadIdentity {
        uid: set_fs_id(libc::SYS_setfsuid, u32::MAX),
        gid: set_fs_id(libc::SYS_setfsgid, u32::MAX),
        capabilities: Capabilities::get()?,
    };
    // The kernel refuses without a word, and answers the id before: asking again tells. An id that
    // is none changes nothing, and is caught that way too.
    for (which, id) in [(libc::SYS_setfsgid, gid), (libc::SYS_setfsuid, uid)] {
        set_fs_id(which, id);
        if set_fs_id(which, u32::MAX) != id {
            return Err(io::Error::from_raw_os_error(super::c::EPERM).into());
        }
    }
    if rights == Rights::Assumed {
        // Leaving user 0 has taken the file system's privileges away; this one comes back.
        let mut now = Capabilities::get()?;
        now.low.effective |= own.capabilities.low.effective & CAP_DAC_OVERRIDE;
        now.set()?;
    }
    call()
}

/// What a thread goes back to when this is dropped.
struct ThreadIdentity {
    uid: u32,
    gid: u32,
    capabilities: Capabilities,
}

impl Drop for ThreadIdentity {
    fn drop(&mut self) {
        set_fs_id(libc::SYS_setfsuid, self.uid);
        set_fs_id(libc::SYS_setfsgid, self.gid);
        // Returning to user 0 has raised all of the file system's privileges, and a thread may
        // always give some up.
        let _ = self.capabilities.set();
    }
}

/// Sets the user (`SYS_setfsuid`) or group (`SYS_setfsgid`) that this thread has for the file
/// system; the one before.
fn set_fs_id(which: libc::c_long, id: u32) -> u32 {
    // SAFETY: both calls take one number and touch no memory. Called past the C library, they
    // change the calling thread alone.
    #[allow(unsafe_code)]
    let before = unsafe { libc::syscall(which, id) };
    // The kernel answers an `int` that holds the bits of an unsigned id.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let before = before as u32;
    before
}

const CAP_DAC_OVERRIDE: u32 = 1 << 1;

/// Privileges of a thread, as capget(2) lays out version 3: those below 32, and the others.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Capabilities {
    low: CapabilityWords,
    high: CapabilityWords,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct CapabilityWords {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` and 0 for the calling thread.
const CAPABILITY_HEADER: [u32; 2] = [0x2008_0522, 0];

impl Capabilities {
    fn get() -> io::Result<Capabilities> {
        let mut header = CAPABILITY_HEADER;
        let mut it = Capabilities::default();
        // SAFETY: both pointers are to live memory of the layout that version 3 has: two words, and
        // two times three words.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), &raw mut it) };
        if result == 0 { Ok(it) } else { Err(io::Error::last_os_error()) }
    }

    fn set(&self) -> io::Result<()> {
        let mut header = CAPABILITY_HEADER;
        // SAFETY: as for `get`; the kernel only reads the second.
        #[allow(unsafe_code)]
        let result =
            unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), &raw const *self) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
