//! The `-o` option list, as mount(8) and fstab write it.
//!
//! Invariant: an option is in [`TABLE`] or it is refused by name, unless the caller asked for
//! tolerance; what the table says is refused is refused even then. An option on its way to the
//! daemon becomes an argument of `raidtape mount`, so a new one there is one line here.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::failure::Failure;
use crate::shown::shown_bytes;

/// How long the daemon may take until the mount answers, unless the options say otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// An option that is known. A name that ends in `=` takes a value, one that ends in `-` is the
/// beginning of any name.
struct Known {
    name: &'static str,
    does: Does,
    /// For the manual page; nothing for what every mount has.
    help: &'static str,
}

/// What an option does.
enum Does {
    /// Concerns others: mount(8) itself, systemd, or nothing that this file system has.
    Nothing,
    /// Adds this flag of `raidtape mount`.
    Flag(&'static str),
    /// Adds this option of `raidtape mount`, with a value that looks right.
    Value(&'static str, Looks),
    /// A word for the kernel. Of those on the same thing the last one counts.
    Kernel(&'static str),
    /// Takes back what was said on this thing.
    Default(&'static str),
    /// The same as these words for the kernel.
    Implies(&'static [&'static str]),
    /// How long to wait.
    Timeout,
    /// Is refused, for this reason.
    Refused(&'static str),
}

/// What a value has to look like. Whether it is right the daemon says.
#[derive(Clone, Copy)]
enum Looks {
    Size,
    /// For options with a fixed set of words.
    Word,
}

const fn known(name: &'static str, does: Does, help: &'static str) -> Known {
    Known { name, does, help }
}

const NO_REMOUNT: &str = "the options of a mounted catalog cannot be changed: unmount it and mount \
                          it anew";
const NO_OWNER: &str = "a snapshot shows the owners that were backed up";
const NO_NAME: &str = "the source of the mount is its catalog, and its type fuse.raidtape";

/// Every option there is.
const TABLE: &[Known] = &[
    known("ro", Does::Kernel("access"), "No change through the mount; jobs neither"),
    known("rw", Does::Default("access"), "Changes in /ingest, and jobs (the default)"),
    known("noexec", Does::Kernel("exec"), "No program runs from the mount"),
    known("exec", Does::Default("exec"), "Programs run from the mount (the default)"),
    known("nosuid", Does::Kernel("suid"), "Set-user-ID bits do not count"),
    known("suid", Does::Default("suid"), "They do (the default for root; others cannot have it)"),
    known("nodev", Does::Kernel("dev"), "Devices cannot be opened"),
    known("dev", Does::Default("dev"), "They can (the default for root; others cannot have it)"),
    known(
        "default_permissions",
        Does::Kernel("permissions"),
        "The kernel checks permissions, as it does with allow_other",
    ),
    known(
        "allow_other",
        Does::Flag("--allow-other"),
        "Other users are let in; the kernel checks permissions",
    ),
    known(
        "cache_size=",
        Does::Value("--cache-size", Looks::Size),
        "Memory for decompressed data, such as 256MiB",
    ),
    known("cache-size=", Does::Value("--cache-size", Looks::Size), ""),
    known(
        "reads=",
        Does::Value("--reads", Looks::Word),
        "How files of snapshots are read: auto, zero-message or passthrough",
    ),
    known(
        "one_session",
        Does::Flag("--one-session"),
        "One session with the kernel, where the snapshots could have one of their own",
    ),
    known(
        "timeout=",
        Does::Timeout,
        "Seconds until the mount has to answer (30 unless it is said)",
    ),
    known(
        "user",
        Does::Implies(SECURE),
        "An ordinary user may mount; implies noexec, nosuid and nodev, as in mount(8)",
    ),
    known("user=", Does::Implies(SECURE), ""),
    known("users", Does::Implies(SECURE), "The same"),
    known("owner", Does::Implies(OWNED), "Implies nosuid and nodev, as in mount(8)"),
    known("group", Does::Implies(OWNED), "The same"),
    known("defaults", Does::Nothing, ""),
    known("auto", Does::Nothing, ""),
    known("noauto", Does::Nothing, ""),
    known("nofail", Does::Nothing, ""),
    known("nouser", Does::Nothing, ""),
    known("_netdev", Does::Nothing, ""),
    known("async", Does::Nothing, ""),
    known("silent", Does::Nothing, ""),
    known("loud", Does::Nothing, ""),
    // Nothing here keeps times of access.
    known("atime", Does::Nothing, ""),
    known("noatime", Does::Nothing, ""),
    known("diratime", Does::Nothing, ""),
    known("nodiratime", Does::Nothing, ""),
    known("relatime", Does::Nothing, ""),
    known("norelatime", Does::Nothing, ""),
    known("strictatime", Does::Nothing, ""),
    known("nostrictatime", Does::Nothing, ""),
    known("lazytime", Does::Nothing, ""),
    known("nolazytime", Does::Nothing, ""),
    known("comment=", Does::Nothing, ""),
    known("uhelper=", Does::Nothing, ""),
    known("x-", Does::Nothing, ""),
    known("X-", Does::Nothing, ""),
    known("subtype=raidtape", Does::Nothing, ""),
    known("remount", Does::Refused(NO_REMOUNT), ""),
    known("uid=", Does::Refused(NO_OWNER), ""),
    known("gid=", Does::Refused(NO_OWNER), ""),
    known("fsname=", Does::Refused(NO_NAME), ""),
    known("subtype=", Does::Refused(NO_NAME), ""),
];

const SECURE: &[&str] = &["noexec", "nosuid", "nodev"];
const OWNED: &[&str] = &["nosuid", "nodev"];

/// What to do with options nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    Refuse,
    Tolerate,
}

/// The options that change how the mount is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub timeout: Duration,
    /// Options of `raidtape mount` and their values.
    daemon: BTreeMap<&'static str, Option<String>>,
    /// For each thing that the kernel can be told, the last word on it.
    kernel: BTreeMap<&'static str, &'static str>,
}

impl Options {
    /// Reads all lists in order; where an option is repeated the last one counts.
    pub fn parse(lists: &[OsString], unknown: Unknown) -> Result<Self, Failure> {
        let mut options =
            Self { timeout: DEFAULT_TIMEOUT, daemon: BTreeMap::new(), kernel: BTreeMap::new() };
        for list in lists {
            for option in split(list.as_bytes()) {
                options.take(&option, unknown)?;
            }
        }
        Ok(options)
    }

    fn take(&mut self, option: &[u8], unknown: Unknown) -> Result<(), Failure> {
        if option.is_empty() {
            return Ok(());
        }
        let Some((known, value)) = find(option) else {
            return match unknown {
                Unknown::Tolerate => Ok(()),
                Unknown::Refuse => Err(Failure::usage(format!(
                    "unknown option `{}`: remove it from the -o list",
                    shown_bytes(option)
                ))),
            };
        };
        match &known.does {
            Does::Nothing => {}
            Does::Flag(flag) => {
                self.daemon.insert(flag, None);
            }
            Does::Value(name, looks) => {
                self.daemon.insert(name, Some(checked(*looks, value, option)?));
            }
            Does::Kernel(thing) => {
                self.kernel.insert(thing, known.name);
            }
            Does::Default(thing) => {
                self.kernel.remove(thing);
            }
            Does::Implies(words) => {
                for word in *words {
                    self.take(word.as_bytes(), unknown)?;
                }
            }
            Does::Timeout => self.timeout = timeout(value, option)?,
            Does::Refused(reason) => {
                return Err(Failure::usage(format!(
                    "option `{}` is not supported: {reason}",
                    shown_bytes(option)
                )));
            }
        }
        Ok(())
    }

    /// The arguments of `raidtape mount` that carry these options out.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut line: Vec<OsString> = Vec::new();
        for (name, value) in &self.daemon {
            line.push(name.into());
            line.extend(value.iter().map(OsString::from));
        }
        let words: Vec<&str> = self.kernel.values().copied().collect();
        if !words.is_empty() {
            line.extend(["-o".into(), words.join(",").into()]);
        }
        line
    }
}

/// The option of the table that this is, and what stands behind its `=`.
fn find(option: &[u8]) -> Option<(&'static Known, &[u8])> {
    // A whole name comes before the beginning of one.
    let whole = TABLE.iter().find(|it| it.name.as_bytes() == option && !is_open(it.name));
    whole.map(|it| (it, &b""[..])).or_else(|| {
        TABLE.iter().filter(|it| is_open(it.name)).find_map(|it| {
            let value = option.strip_prefix(it.name.as_bytes())?;
            Some((it, value))
        })
    })
}

fn is_open(name: &str) -> bool {
    name.ends_with(['=', '-'])
}

/// Splits at commas, but not at those between double quotes, as mount(8) does, or behind a
/// backslash, as FUSE's own tools do.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut options = Vec::new();
    let mut option = Vec::new();
    let mut is_quoted = false;
    let mut bytes = list.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => option.push(*bytes.next().unwrap_or(byte)),
            b'"' => is_quoted = !is_quoted,
            b',' if !is_quoted => options.push(std::mem::take(&mut option)),
            other => option.push(*other),
        }
    }
    options.push(option);
    options
}

fn checked(looks: Looks, value: &[u8], option: &[u8]) -> Result<String, Failure> {
    let first = value.first().is_some_and(|it| match looks {
        Looks::Size => it.is_ascii_digit(),
        Looks::Word => it.is_ascii_alphanumeric(),
    });
    let plain = |byte: &u8| match looks {
        Looks::Size => byte.is_ascii_alphanumeric() || *byte == b'.',
        Looks::Word => byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'),
    };
    let wanted = match looks {
        Looks::Size => "a size such as 256M",
        Looks::Word => "a word",
    };
    match std::str::from_utf8(value) {
        Ok(text) if first && value.iter().all(plain) => Ok(text.to_owned()),
        _ => Err(Failure::usage(format!("option `{}` needs {wanted}", shown_bytes(option)))),
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

/// An option and what it does, in lines that neither a terminal nor a manual page breaks.
fn described(known: &Known) -> String {
    const COLUMNS: usize = 70;
    let mut text = String::new();
    let mut line = format!("  {:<21}", known.name);
    for word in known.help.split(' ') {
        if line.len() + 1 + word.len() > COLUMNS {
            text.push_str(&format!("{line}\n"));
            line = " ".repeat(23);
        }
        line.push_str(&format!(" {word}"));
    }
    format!("{text}{line}\n")
}

/// The options for help and manual pages.
pub fn help() -> String {
    let mut text = String::from("Options for -o, as a list with commas; the last one counts:\n\n");
    for known in TABLE.iter().filter(|it| !it.help.is_empty()) {
        text.push_str(&described(known));
    }
    let others = TABLE.iter().filter(|it| {
        matches!(it.does, Does::Nothing) && it.help.is_empty() && !it.name.starts_with("sub")
    });
    let names: Vec<String> = others
        .map(|it| match it.name.ends_with('-') {
            true => format!("{}*", it.name),
            false => it.name.to_owned(),
        })
        .collect();
    text.push_str(&format!("\nAccepted, with no effect here: {}.\n", names.join(", ")));
    text.push_str("\nA value with a comma in it stands in double quotes.");
    text
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

    fn arguments(list: &str) -> String {
        let line = parse(&[list]).unwrap().arguments();
        line.join(" ".as_ref()).into_string().unwrap()
    }

    fn refusal(list: &str) -> String {
        let failure = parse(&[list]).unwrap_err();
        assert_eq!(failure.class, Class::Usage);
        failure.message
    }

    #[test]
    fn nothing_given_means_defaults() {
        let options = parse(&[]).unwrap();
        assert!(options.arguments().is_empty());
        assert_eq!(options.timeout, Duration::from_secs(30));
        assert_eq!(parse(&[",,"]).unwrap(), options);
    }

    #[test]
    fn lists_are_joined_and_the_last_value_counts() {
        let options = parse(&["rw,allow_other,cache_size=1M", "cache-size=2G,timeout=5"]).unwrap();
        assert_eq!(options.arguments(), ["--allow-other", "--cache-size", "2G"]);
        assert_eq!(options.timeout, Duration::from_secs(5));
    }

    #[test]
    fn how_files_are_read_is_for_the_daemon() {
        assert_eq!(arguments("one_session,reads=passthrough"), "--one-session --reads passthrough");
        assert!(refusal("reads=").contains("needs a word"));
    }

    #[test]
    fn the_kernel_gets_the_last_word_on_each_thing() {
        assert_eq!(arguments("ro"), "-o ro");
        assert_eq!(arguments("ro,rw"), "");
        assert_eq!(arguments("nosuid,ro,noexec,nodev"), "-o ro,nodev,noexec,nosuid");
        assert_eq!(arguments("noexec,exec,default_permissions"), "-o default_permissions");
        assert_eq!(arguments("user,exec"), "-o nodev,nosuid");
        assert_eq!(arguments("exec,user=me"), "-o nodev,noexec,nosuid");
        assert_eq!(arguments("owner"), "-o nodev,nosuid");
    }

    #[test]
    fn options_for_others_are_ignored() {
        let list = "defaults,auto,noauto,nofail,_netdev,nouser,async,atime,noatime,relatime,\
                    strictatime,lazytime,x-systemd.automount,x-gvfs-show,X-mount.mkdir,\
                    comment=a b,uhelper=udisks2,subtype=raidtape";
        assert_eq!(parse(&[list]).unwrap(), parse(&[]).unwrap());
    }

    #[test]
    fn a_comma_can_be_part_of_a_value() {
        assert_eq!(arguments(r"comment=a\,ro,nodev"), "-o nodev");
        assert_eq!(arguments(r#"comment="a,ro",nodev"#), "-o nodev");
        assert_eq!(arguments(r"comment=a\\,ro"), "-o ro");
        assert_eq!(split(br#"a"b,c"d,\"e,\"#), [&b"ab,cd"[..], b"\"e", b"\\"]);
    }

    #[test]
    fn unknown_options_are_named() {
        assert!(refusal("rw,sync").contains("`sync`"));
        for list in ["allow_other=1", "rwx", "comment", "timeout", "x", "cache_size", "ro=1"] {
            assert!(refusal(list).contains(&format!("`{list}`")), "{list}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_reason() {
        assert!(refusal("remount,ro").contains("mount it anew"));
        assert!(refusal("uid=1000").contains("owners"));
        assert!(refusal("fsname=x").contains("fuse.raidtape"));
        assert!(refusal("subtype=sshfs").contains("fuse.raidtape"));
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
        assert!(checked(Looks::Word, b"zero-message", b"").is_ok());
        assert!(checked(Looks::Word, b"--x", b"").is_err());
    }

    #[test]
    fn tolerance_covers_unknown_options_only() {
        let tolerant = |list: &str| Options::parse(&[list.into()], Unknown::Tolerate);
        assert_eq!(tolerant("sync,allow_other").unwrap().arguments(), ["--allow-other"]);
        assert!(tolerant("remount").is_err());
        assert!(tolerant("timeout=x").is_err());
    }

    #[test]
    fn bytes_that_are_no_text_are_escaped_in_messages() {
        let list = OsString::from_vec(b"caf\xe9\n".to_vec());
        let failure = Options::parse(&[list], Unknown::Refuse).unwrap_err();
        assert!(failure.message.contains("`caf\\xe9\\n`"), "{failure:?}");
    }

    #[test]
    fn every_option_is_listed_once_and_in_the_help() {
        let text = help();
        for (at, known) in TABLE.iter().enumerate() {
            assert!(!TABLE[at + 1..].iter().any(|it| it.name == known.name), "{}", known.name);
            let hidden = ["cache-size=", "user=", "subtype=raidtape"].contains(&known.name);
            let refused = matches!(known.does, Does::Refused(_));
            assert!(hidden || refused || text.contains(known.name), "{}", known.name);
        }
        let (list, _) = text.split_once("\nAccepted").unwrap();
        assert!(list.lines().all(|it| it.len() <= 70), "{list}");
        assert!(list.contains("\n                        allow_other\n"), "{list}");
    }
}
