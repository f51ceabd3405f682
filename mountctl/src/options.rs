//! The `-o` option list, as mount(8) and fstab write it.
//!
//! Invariant: an option that is neither carried out nor known to be harmless is refused by name,
//! unless the caller asked for tolerance. As with mount(8), a comma cannot be escaped.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::failure::Failure;
use crate::shown::shown_bytes;

/// How long the daemon may take until the mount answers, unless the options say otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Options for others: for mount(8) itself, for systemd, or already true of every mount.
const IGNORED: [&str; 23] = [
    "rw", "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner",
    "group", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "atime", "noatime", "relatime",
    // mount(8) writes the caller's name into the option when an ordinary user mounts.
    "user=", "comment=", "x-",
];

/// What to do with options nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    Refuse,
    Tolerate,
}

/// The options that change how the mount is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub allow_other: bool,
    pub cache_size: Option<String>,
    pub timeout: Duration,
}

impl Options {
    /// Reads all lists in order; where an option is repeated the last one counts.
    pub fn parse(lists: &[OsString], unknown: Unknown) -> Result<Self, Failure> {
        let mut options = Self { allow_other: false, cache_size: None, timeout: DEFAULT_TIMEOUT };
        for list in lists {
            for option in list.as_bytes().split(|byte| *byte == b',') {
                options.take(option, unknown)?;
            }
        }
        Ok(options)
    }

    fn take(&mut self, option: &[u8], unknown: Unknown) -> Result<(), Failure> {
        if option == b"allow_other" {
            self.allow_other = true;
        } else if let Some(size) = value_of(option, &["cache_size=", "cache-size="]) {
            self.cache_size = Some(cache_size(size, option)?);
        } else if let Some(seconds) = value_of(option, &["timeout="]) {
            self.timeout = timeout(seconds, option)?;
        } else if option == b"ro" {
            // Tolerating this one would silently mount read-write what was asked to be read-only.
            return Err(Failure::usage(
                "option `ro` is not supported: backups are started by writing to the mount; \
                 leave the option out",
            ));
        } else if !is_ignored(option) && unknown == Unknown::Refuse {
            return Err(Failure::usage(format!(
                "unknown option `{}`: remove it from the -o list",
                shown_bytes(option)
            )));
        }
        Ok(())
    }
}

fn value_of<'a>(option: &'a [u8], names: &[&str]) -> Option<&'a [u8]> {
    names.iter().find_map(|name| option.strip_prefix(name.as_bytes()))
}

fn is_ignored(option: &[u8]) -> bool {
    option.is_empty()
        || IGNORED.iter().any(|known| {
            if known.ends_with(['=', '-']) {
                option.starts_with(known.as_bytes())
            } else {
                option == known.as_bytes()
            }
        })
}

/// The daemon reads the number and its unit; here it is only kept from looking like an option.
fn cache_size(value: &[u8], option: &[u8]) -> Result<String, Failure> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'.';
    match std::str::from_utf8(value) {
        Ok(text) if value.first().is_some_and(u8::is_ascii_digit) && value.iter().all(plain) => {
            Ok(text.to_owned())
        }
        _ => Err(Failure::usage(format!(
            "option `{}` needs a size such as 256M",
            shown_bytes(option)
        ))),
    }
}

fn timeout(value: &[u8], option: &[u8]) -> Result<Duration, Failure> {
    // u32 keeps the deadline within what an Instant can hold.
    let seconds: Option<u32> = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    match seconds {
        Some(seconds) if seconds > 0 => Ok(Duration::from_secs(u64::from(seconds))),
        _ => Err(Failure::usage(format!(
            "option `{}` needs a whole number of seconds, at least 1",
            shown_bytes(option)
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::failure::Class;

    fn parse(lists: &[&str]) -> Result<Options, Failure> {
        let lists: Vec<OsString> = lists.iter().map(OsString::from).collect();
        Options::parse(&lists, Unknown::Refuse)
    }

    fn refusal(list: &str) -> String {
        let failure = parse(&[list]).unwrap_err();
        assert_eq!(failure.class, Class::Usage);
        failure.message
    }

    #[test]
    fn nothing_given_means_defaults() {
        let options = parse(&[]).unwrap();
        assert!(!options.allow_other);
        assert_eq!(options.cache_size, None);
        assert_eq!(options.timeout, Duration::from_secs(30));
        assert_eq!(parse(&[",,"]).unwrap(), options);
    }

    #[test]
    fn lists_are_joined_and_the_last_value_counts() {
        let options = parse(&["rw,allow_other,cache_size=1M", "cache-size=2G,timeout=5"]).unwrap();
        assert!(options.allow_other);
        assert_eq!(options.cache_size.as_deref(), Some("2G"));
        assert_eq!(options.timeout, Duration::from_secs(5));
    }

    #[test]
    fn options_for_others_are_ignored() {
        let list = "rw,defaults,auto,noauto,nofail,_netdev,user,nouser,users,owner,group,exec,\
                    noexec,suid,nosuid,dev,nodev,atime,noatime,relatime,x-systemd.automount,\
                    x-gvfs-show,comment=a b,user=me";
        assert_eq!(parse(&[list]).unwrap(), parse(&[]).unwrap());
    }

    #[test]
    fn unknown_options_are_named() {
        assert!(refusal("rw,sync").contains("`sync`"));
        assert!(refusal("ro").contains("`ro`"));
        assert!(refusal("allow_other=1").contains("`allow_other=1`"));
        assert!(refusal("rwx").contains("`rwx`"));
        assert!(refusal("comment").contains("`comment`"));
    }

    #[test]
    fn bad_values_are_refused() {
        for list in ["timeout=", "timeout=0", "timeout=-1", "timeout=1.5"] {
            assert!(refusal(list).contains(list));
        }
        for list in ["cache_size=", "cache_size=-1", "cache-size=1 M"] {
            assert!(refusal(list).contains(list));
        }
        assert!(refusal("timeout=99999999999999999999").contains("seconds"));
    }

    #[test]
    fn tolerance_covers_unknown_options_but_never_ro() {
        let tolerant = |list: &str| Options::parse(&[list.into()], Unknown::Tolerate);
        assert!(tolerant("sync,allow_other").unwrap().allow_other);
        assert!(tolerant("ro").is_err());
        assert!(tolerant("timeout=x").is_err());
    }

    #[test]
    fn bytes_that_are_no_text_are_escaped_in_messages() {
        let list = OsString::from_vec(b"caf\xe9\n".to_vec());
        let failure = Options::parse(&[list], Unknown::Refuse).unwrap_err();
        assert!(failure.message.contains("`caf\\xe9\\n`"), "{failure:?}");
    }
}
