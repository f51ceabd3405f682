//! Listings of the mount's own directories: its root, `.ctl` and what is below that.
//!
//! Nothing is held for one that is open: each request makes the list anew and goes on behind the
//! key of the last item. Invariant: an item has the same key in every listing.

use std::ffi::OsStr;

use super::errno::FsResult;
use super::node::Node;
use super::tree::{Add, ItemStat};
use crate::sys::Stat;

/// An item: its key, from 1 on, its name, and its attributes.
pub type Item = (u64, String, Stat);

/// Gives out `.`, `..` and then `items`, in the order of their keys, from `offset` on until `add`
/// says that it is full.
pub fn give_out(
    dir: Node,
    items: impl Iterator<Item = FsResult<Item>>,
    offset: u64,
    add: Add<'_>,
) -> FsResult<()> {
    for (at, name, node) in [(0, ".", dir), (1, "..", Node::Root)] {
        let dot = ItemStat::Dot(node.ino().unwrap_or(1));
        if offset <= at && add(OsStr::new(name), at + 1, dot) {
            return Ok(());
        }
    }
    for item in items {
        let (key, name, stat) = item?;
        let next = key.saturating_add(2);
        if next > offset && add(OsStr::new(&name), next, ItemStat::Known(stat)) {
            break;
        }
    }
    Ok(())
}

/// The key of the last item that has been given out before `offset`.
pub fn key_before(offset: u64) -> u64 {
    offset.saturating_sub(2)
}

#[cfg(test)]
mod tests {
    use super::super::errno::Errno;
    use super::*;
    use crate::sys::{self, c};
    use std::path::Path;

    #[test]
    fn a_listing_in_pieces_has_each_item_once() {
        let stat = sys::stat(Path::new("/")).unwrap();
        // Jobs come and go between two requests.
        let lists = [&[1, 2, 5][..], &[2, 5, 6], &[2, 5, 6, 9], &[5, 6, 9]];
        for most in 1..5 {
            let (mut names, mut offset, mut turn) = (Vec::new(), 0, 0);
            loop {
                let before = names.len();
                let list: &[u64] = lists[turn.min(lists.len() - 1)];
                let items = list.iter().map(|key| Ok((*key, key.to_string(), stat)));
                give_out(Node::Jobs, items, offset, &mut |name, next, _| {
                    if names.len() - before == most {
                        return true;
                    }
                    names.push(name.to_str().unwrap().to_owned());
                    offset = next;
                    false
                })
                .unwrap();
                if names.len() == before {
                    break;
                }
                turn += 1;
            }
            assert_eq!(names[..2], [".", ".."]);
            let mut sorted = names[2..].to_vec();
            sorted.dedup();
            assert_eq!(names[2..], sorted);
            for always in ["5", "9"] {
                assert!(names.contains(&always.to_owned()), "{names:?}");
            }
        }
        let failing = std::iter::once(Err(Errno(c::EIO)));
        assert_eq!(give_out(Node::Jobs, failing, 2, &mut |_, _, _| false), Err(Errno(c::EIO)));
    }
}
