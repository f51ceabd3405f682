//! A word to the service manager, in the protocol of sd_notify(3): a datagram to the socket that
//! `$NOTIFY_SOCKET` names. Written out here because of sockets whose name begins with `@`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tells lines such as `READY=1`, if there is anybody to be told. That it cannot be is no reason to
/// stop.
pub fn tell(lines: &str) {
    let socket = std::env::var_os("NOTIFY_SOCKET").filter(|it| !it.is_empty());
    if let Some(Err(e)) = socket.map(|it| send(&it, lines)) {
        log::warn!("telling the service manager: {e}");
    }
}

fn send(name: &OsStr, lines: &str) -> io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(lines.as_bytes(), &address)?;
    Ok(())
}
