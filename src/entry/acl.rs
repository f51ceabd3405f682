//! POSIX ACLs as the kernel keeps them in an attribute: what of a mode is true without them.
//!
//! Form (linux/posix_acl_xattr.h): a 32-bit version, 2; then for each entry a 16-bit tag, 16 bits
//! of permissions and a 32-bit user or group number, all little-endian.

/// Key of the ACL that says who may use a file.
pub const ACCESS: &str = "system.posix_acl_access";
/// Key of the ACL that files made in a directory get.
pub const DEFAULT: &str = "system.posix_acl_default";

const VERSION: u32 = 2;
const NAMED_USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;

/// The part of `mode` that may be granted by one who does not look at the ACL: to the group and to
/// others only what no entry denies to any of them. One that cannot be read denies all.
pub fn mode_without(mode: u32, acl: &[u8]) -> u32 {
    let (group, others) = allowed(acl).unwrap_or((0, 0));
    mode & (!0o077 | group << 3 | others)
}

fn allowed(acl: &[u8]) -> Option<(u32, u32)> {
    let (version, entries) = acl.split_first_chunk()?;
    let (entries, rest) = entries.as_chunks::<8>();
    if u32::from_le_bytes(*version) != VERSION || !rest.is_empty() {
        return None;
    }
    let (mut group, mut named, mut mask) = (0, None, 7);
    for [tag0, tag1, perm0, perm1, ..] in entries {
        let permissions = u32::from(u16::from_le_bytes([*perm0, *perm1]));
        match u16::from_le_bytes([*tag0, *tag1]) {
            NAMED_USER | NAMED_GROUP => named = Some(named.unwrap_or(7) & permissions),
            OWNING_GROUP => group = permissions,
            MASK => mask = permissions,
            _ => {}
        }
    }
    // Whoever is named comes as one of the group or of the others.
    let named = named.map_or(7, |it| it & mask);
    Some((group & named, named))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, permissions) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(u32::MAX.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn nobody_is_granted_what_an_entry_denies() {
        let (owner, others) = (0x01, 0x20);
        // u::rw- g::r-- o::r--
        let plain = acl(&[(owner, 6), (OWNING_GROUP, 4), (others, 4)]);
        assert_eq!(mode_without(0o100_644, &plain), 0o100_644);
        // u::rwx u:x:rwx g::--- m::rwx o::---: the mode shows the mask as the group's.
        let named = acl(&[(owner, 7), (NAMED_USER, 7), (OWNING_GROUP, 0), (MASK, 7), (others, 0)]);
        assert_eq!(mode_without(0o40_770, &named), 0o40_700);
        // u::rwx u:x:--- g::r-x m::r-x o::r-x: x comes as one of the others.
        let denied = acl(&[(owner, 7), (NAMED_USER, 0), (OWNING_GROUP, 5), (MASK, 5), (others, 5)]);
        assert_eq!(mode_without(0o755, &denied), 0o700);
        // u::rwx g:x:rwx g::rwx m::r-- o::rwx: the mask limits whom it names.
        let masked =
            acl(&[(owner, 7), (OWNING_GROUP, 7), (NAMED_GROUP, 7), (MASK, 4), (others, 7)]);
        assert_eq!(mode_without(0o747, &masked), 0o744);
    }

    #[test]
    fn what_is_no_acl_grants_nothing() {
        for bytes in [&[][..], &[2, 0, 0], &[1, 0, 0, 0], &[2, 0, 0, 0, 4, 0, 7]] {
            assert_eq!(mode_without(0o4777, bytes), 0o4700);
        }
    }
}
