//! The words in which work is asked for: the same on the command line and in a control file.
//!
//! A control file takes the argument line of the command, quoted as for a POSIX shell. Bytes that
//! are not UTF-8 are allowed wherever the command line allows them.

pub mod genmeta;
pub mod restore;
pub mod tape;
pub mod validate;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Parser};

use super::Archiving;
use crate::backup::{self, Input, Rule, Rules, Stream};
use crate::error::{Error, Quoted, Result};
use crate::sys::quoted;

pub use restore::Restoring;

/// Longest line that a control file takes, in bytes.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// The source name of what is put into a mount's `/ingest`.
pub const INGEST: &str = "ingest";

/// The arguments of `backup`.
#[derive(Args, Clone, Debug)]
pub struct BackupArgs {
    /// Directory to back up
    source: Option<PathBuf>,
    /// Name of the source; runs of one name follow one another [default: the absolute path]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<OsString>,
    /// Threads that read, hash and compress
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    max_workers: Option<u16>,
    /// Threads that append to blocks at one time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    max_write_workers: Option<u16>,
    /// Memory for all that reads and compresses at one time: fewer do where it is little [default:
    /// half of the machine's, at most 16GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_limit: Option<u64>,
    /// Do everything in one thread
    #[arg(long)]
    single_threaded: bool,
    #[command(flatten)]
    patterns: Patterns,
    /// Leave out the contents of directories with a real CACHEDIR.TAG; the tag stays
    #[arg(long)]
    exclude_caches: bool,
    /// Leave out the contents of directories in which NAME is; NAME stays, unless it is a
    /// directory; may be given several times
    #[arg(long, value_name = "NAME")]
    exclude_if_present: Vec<OsString>,
    /// Leave out files larger than SIZE, as in 500MB or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    exclude_larger_than: Option<u64>,
    /// Stay on the file system of the source
    #[arg(long)]
    one_file_system: bool,
    /// Read files that look unchanged too
    #[arg(long)]
    force_read: bool,
    /// Leave the metas beside the blocks to a later genmeta
    #[arg(long)]
    no_meta: bool,
    /// Say what would be added, modified and deleted, and write nothing; with -v every path
    #[arg(long)]
    dry_run: bool,
    /// Make no copy of the catalog on the volumes after the run
    #[arg(long)]
    no_catalog_copy: bool,
    /// Tag the run; may be given several times
    #[arg(long = "tag", value_name = "T")]
    tags: Vec<String>,
    /// Keep a comment with the run
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    comment: String,
    /// Back up standard input as one file, which --name names
    #[arg(long)]
    stdin: bool,
    /// Back up what a command prints as one file, which --name names; if the command fails, so does
    /// the run
    #[arg(long)]
    stdin_from_command: bool,
    /// File that the stream becomes in the snapshot: a name or a relative path
    #[arg(long = "name", value_name = "FILE")]
    file: Option<OsString>,
    /// The command of --stdin-from-command and its arguments
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// What `--exclude`, `--include` and `--exclude-from` say, in the order in which they stand: the
/// last one that matches counts.
#[derive(Clone, Debug, Default)]
struct Patterns(Vec<Rule>);

/// The options that patterns come with: name, name of the value, help.
const PATTERNS: [(&str, &str, &str); 3] = [
    (
        "exclude",
        "GLOB",
        "Leave out what matches, as in a .gitignore in the source; the last pattern that matches \
         counts; may be given several times",
    ),
    (
        "include",
        "GLOB",
        "Keep what matches though an --exclude before it does not; a path also keeps the \
         directories on its way; may be given several times",
    ),
    (
        "exclude-from",
        "FILE",
        "Leave out what the lines of FILE say, which is written like a .gitignore; may be given \
         several times",
    ),
];

impl Args for Patterns {
    fn augment_args(command: Command) -> Command {
        PATTERNS.iter().fold(command, |command, &(name, value, help)| {
            let arg = Arg::new(name).long(name).value_name(value).help(help);
            command.arg(arg.action(ArgAction::Append).value_parser(ValueParser::os_string()))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Patterns::augment_args(command)
    }
}

impl FromArgMatches for Patterns {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Patterns, clap::Error> {
        let mut found: Vec<(usize, Rule)> = Vec::new();
        for (name, _, _) in PATTERNS {
            let values = matches.get_many::<OsString>(name).unwrap_or_default().cloned();
            let indices = matches.indices_of(name).unwrap_or_default();
            found.extend(indices.zip(values.map(|it| match name {
                "exclude" => Rule::Exclude(it),
                "include" => Rule::Include(it),
                _ => Rule::ExcludeFrom(it.into()),
            })));
        }
        found.sort_by_key(|it| it.0);
        Ok(Patterns(found.into_iter().map(|it| it.1).collect()))
    }

    fn update_from_arg_matches(
        &mut self,
        matches: &ArgMatches,
    ) -> std::result::Result<(), clap::Error> {
        *self = Patterns::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A size in bytes, with an optional unit: `1048576`, `1MiB`, `1MB`.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    text.parse::<bytesize::ByteSize>().map(|it| it.as_u64())
}

impl BackupArgs {
    /// Whether only to say what would be done.
    pub fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// What the backup has to do, if the arguments go together.
    pub fn options(&self) -> Result<backup::Options> {
        let (source, stream) = self.source_or_stream()?;
        let rules = Rules {
            rules: self.patterns.0.clone(),
            only_plain_files: false,
            caches: self.exclude_caches,
            if_present: self.exclude_if_present.clone(),
            larger_than: self.exclude_larger_than,
        };
        if stream.is_some() && !(rules.is_empty() && !self.one_file_system && !self.force_read) {
            let message = "a stream is one file: --exclude and its kin, --one-file-system and \
                           --force-read are about directories";
            return Err(Error::usage(message));
        }
        Ok(backup::Options {
            source,
            stream,
            name: self.name.as_ref().map(|it| it.as_bytes().to_vec()),
            max_workers: self.max_workers.map(usize::from),
            max_write_workers: self.max_write_workers.map(usize::from),
            memory_limit: self.memory_limit,
            single_threaded: self.single_threaded,
            rules,
            one_file_system: self.one_file_system,
            no_catalog_copy: self.no_catalog_copy,
            force_read: self.force_read,
            no_meta: self.no_meta,
            tags: self.tags.clone(),
            comment: self.comment.clone(),
        })
    }

    fn source_or_stream(&self) -> Result<(PathBuf, Option<Stream>)> {
        let (source, rest) = match (&self.source, self.command.as_slice()) {
            // What stands after -- is the command only where there is one.
            (None, [source]) if !self.stdin_from_command => (Some(source.into()), &[][..]),
            (source, rest) => (source.clone(), rest),
        };
        let input = match (self.stdin, self.stdin_from_command) {
            (true, true) => return Err(Error::usage("--stdin or --stdin-from-command, not both")),
            (true, false) => Some(Input::Stdin),
            (false, true) => Some(Input::Command(rest.to_vec())),
            (false, false) => None,
        };
        if let (Some(word), false) = (rest.first(), self.stdin_from_command) {
            let word = Quoted(word.as_bytes());
            return Err(Error::usage(format!("what is '{word}' for? There is a source already")));
        }
        match (source, input, &self.file) {
            (Some(source), None, None) => Ok((source, None)),
            (None, None, _) => Err(Error::usage("what to back up? Give a directory, or --stdin")),
            (Some(_), None, Some(_)) => {
                Err(Error::usage("--name is for --stdin and --stdin-from-command"))
            }
            (Some(source), Some(_), _) => Err(Error::usage(format!(
                "a stream or the directory {}, not both; a command stands after --",
                quoted(&source)
            ))),
            (None, Some(_), None) => Err(Error::usage("which file is it? Give --name FILE")),
            (None, Some(Input::Command(words)), _) if words.is_empty() => {
                Err(Error::usage("which command? Give it after --"))
            }
            (None, Some(input), Some(file)) => {
                let stream = Stream { file: file.clone(), input };
                stream.check()?;
                Ok((PathBuf::new(), Some(stream)))
            }
        }
    }
}

/// What a control file can be asked for: each is the command of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// `backup`.
    Backup,
    /// `restore`.
    Restore,
    /// `restore-folder`.
    RestoreFolder,
    /// `revert-to-run`.
    RevertToRun,
    /// `validate`.
    Validate,
    /// `genmeta`.
    Genmeta,
    /// `replicate`.
    Replicate,
    /// `tape`, as far as it is work for a queue.
    Tape,
}

/// Every verb, in the order of the alphabet.
pub const VERBS: [Verb; 8] = [
    Verb::Backup,
    Verb::Genmeta,
    Verb::Replicate,
    Verb::Restore,
    Verb::RestoreFolder,
    Verb::RevertToRun,
    Verb::Tape,
    Verb::Validate,
];

impl Verb {
    /// The word for it: the name of the command and of the control file.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Backup => "backup",
            Verb::Restore => "restore",
            Verb::RestoreFolder => "restore-folder",
            Verb::RevertToRun => "revert-to-run",
            Verb::Validate => "validate",
            Verb::Genmeta => "genmeta",
            Verb::Replicate => "replicate",
            Verb::Tape => "tape",
        }
    }

    /// What its line looks like.
    pub fn usage(self) -> &'static str {
        match self {
            Verb::Backup => "SOURCE [options], or ingest",
            Verb::Restore => "FILE DEST [options]",
            Verb::RestoreFolder => "FOLDER DEST [options]",
            Verb::RevertToRun => "RUN DEST [options]",
            Verb::Validate | Verb::Genmeta => "[options]",
            Verb::Replicate => "an empty line",
            Verb::Tape => "archive RUN [options]",
        }
    }
}

/// Work that can be asked for through a control file.
#[derive(Clone, Debug)]
pub enum Request {
    /// Back up a source.
    Backup(Box<backup::Options>),
    /// Back up what was put into the mount, and remove there what is stored.
    BackupAndClear(Box<backup::Options>),
    /// Restore a file, a folder or a run.
    Restore(Box<Restoring>),
    /// Check everything, or a part; and repair what is found, if that is asked for.
    Validate(crate::validate::Options, bool),
    /// Complete metas and manifests.
    Genmeta(crate::genmeta::Options),
    /// Make the copies that lack.
    Replicate,
    /// Archive a run to tape.
    Archive(Box<Archiving>),
}

/// What the words of a line mean in the process that does the work.
#[derive(Clone, Debug)]
pub struct Site {
    /// Where what has been put into the mount's `/ingest` lies.
    pub ingest_dir: PathBuf,
    /// Where the mount is.
    pub mountpoint: PathBuf,
}

#[derive(Parser)]
#[command(name = "backup", no_binary_name = true, disable_help_flag = true)]
struct BackupLine {
    #[command(flatten)]
    args: BackupArgs,
    /// Remove from the mount's /ingest what the run has stored
    #[arg(long)]
    clear: bool,
}

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct EmptyLine {}

/// Reads a line written to the control file of a verb: the arguments of the command.
pub fn parse(verb: Verb, line: &[u8], site: &Site) -> Result<Request> {
    if line.len() > LINE_BYTES_MAX {
        return Err(Error::usage("the line is too long"));
    }
    let words = split_words(line)?;
    match verb {
        Verb::Backup => parse_backup(words, &site.ingest_dir),
        Verb::Restore | Verb::RestoreFolder | Verb::RevertToRun => {
            let restoring = restore::parse(verb, words, &site.mountpoint)?;
            Ok(Request::Restore(Box::new(restoring)))
        }
        Verb::Validate => {
            let (options, is_repair) = validate::parse(words)?;
            Ok(Request::Validate(options, is_repair))
        }
        Verb::Genmeta => Ok(Request::Genmeta(genmeta::parse(words)?)),
        Verb::Replicate => {
            EmptyLine::try_parse_from(words).map_err(refused)?;
            Ok(Request::Replicate)
        }
        Verb::Tape => Ok(Request::Archive(Box::new(tape::parse(words)?))),
    }
}

/// What clap has against a line, in one line.
fn refused(error: clap::Error) -> Error {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    match first.strip_suffix(':') {
        // The rest is a list.
        Some(start) => {
            let list: Vec<&str> = text.lines().skip(1).map(str::trim).collect();
            let list = list.split(|it| it.is_empty()).next().unwrap_or_default().join(" ");
            Error::usage(format!("{start}: {}", Quoted(list.as_bytes())))
        }
        None => Error::usage(Quoted(first.as_bytes()).to_string()),
    }
}

/// Reads the words of a backup: its arguments, or `ingest` with options.
fn parse_backup(words: Vec<OsString>, ingest_dir: &Path) -> Result<Request> {
    let BackupLine { args, clear } = BackupLine::try_parse_from(words).map_err(refused)?;
    if args.stdin || args.stdin_from_command {
        let message = "a mount has no standard input and starts no commands: run raidtape backup";
        return Err(Error::usage(message));
    }
    if args.dry_run {
        return Err(Error::usage("a job writes what it finds: run raidtape backup --dry-run"));
    }
    let mut options = args.options()?;
    let is_ingest = options.source.as_os_str() == INGEST;
    if clear && !is_ingest {
        return Err(Error::usage("--clear is for 'ingest': no other source is ever changed"));
    }
    if is_ingest {
        options.source = ingest_dir.to_path_buf();
        options.name.get_or_insert_with(|| INGEST.into());
    }
    if !options.source.is_absolute() {
        return Err(Error::usage("the source must be an absolute path, or 'ingest'"));
    }
    // The mount's process has a directory of its own, and reads the file as its owner, who wrote
    // the line. It does so when the job's turn comes: the file may lie in the mount itself.
    for rule in &options.rules.rules {
        if let Rule::ExcludeFrom(path) = rule
            && !path.is_absolute()
        {
            let message = format!("--exclude-from {} must be an absolute path", quoted(path));
            return Err(Error::usage(message));
        }
    }
    options.rules.check()?;
    options.rules.only_plain_files = true;
    // Times of change do not tell of what is written to mapped memory: only what was read since
    // nobody has it open for writing may go.
    options.force_read |= clear;
    let options = Box::new(options);
    Ok(if clear { Request::BackupAndClear(options) } else { Request::Backup(options) })
}

/// Splits a line as a shell would. The splitter knows text only; every byte is made the character
/// of its number and back again, which changes nothing that quoting is made of.
fn split_words(line: &[u8]) -> Result<Vec<OsString>> {
    if line.contains(&0) {
        return Err(Error::usage("the line has a zero byte"));
    }
    let text: String = line.iter().map(|byte| char::from(*byte)).collect();
    let words = shell_words::split(&text).map_err(|e| Error::usage(e.to_string()))?;
    let back = |word: String| -> Vec<u8> {
        word.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect()
    };
    Ok(words.into_iter().map(|word| OsString::from_vec(back(word))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A word as a shell wants it quoted.
    fn quote(word: &[u8]) -> Vec<u8> {
        let mut out = vec![b'\''];
        for byte in word {
            match byte {
                b'\'' => out.extend(b"'\\''"),
                other => out.push(*other),
            }
        }
        out.push(b'\'');
        out
    }

    proptest! {
        #[test]
        fn quoted_words_come_back(
            words in prop::collection::vec(prop::collection::vec(1u8.., 0..20), 0..6),
            blanks in "[ \t\n]{1,3}",
        ) {
            let quoted: Vec<Vec<u8>> = words.iter().map(|it| quote(it)).collect();
            let line = quoted.join(blanks.as_bytes());
            let back = split_words(&line)?;
            prop_assert_eq!(back.into_iter().map(OsString::into_vec).collect::<Vec<_>>(), words);
        }

        #[test]
        fn a_quoted_request_comes_back(
            source in prop::collection::vec(1u8.., 0..20),
            name in prop::collection::vec(1u8.., 1..20),
            tags in prop::collection::vec("[^\0]{0,9}", 0..3),
        ) {
            let source = [b"/", &source[..]].concat();
            let mut line = quote(&source);
            line.extend([b" --as=", &quote(&name)[..]].concat());
            for tag in &tags {
                line.extend([b" --tag=", &quote(tag.as_bytes())[..]].concat());
            }
            let args = parse(&line)?;
            prop_assert_eq!(args.source.as_os_str().as_bytes(), source);
            prop_assert_eq!(args.name.unwrap(), name);
            prop_assert_eq!(args.tags, tags);
        }

        #[test]
        fn any_line_is_read_or_refused(bytes: Vec<u8>, text in "[a-z/'\"\\\\ \n=-]{0,60}") {
            for line in [&bytes[..], text.as_bytes()] {
                if let Err(e) = parse(line) {
                    prop_assert_eq!(e.kind(), crate::error::ErrorKind::Usage);
                }
            }
        }
    }

    fn site() -> Site {
        Site { ingest_dir: "/c.ingest".into(), mountpoint: "/mnt/point".into() }
    }

    fn parse(line: &[u8]) -> Result<backup::Options> {
        match super::parse(Verb::Backup, line, &site())? {
            Request::Backup(options) => Ok(*options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn verbs_that_need_no_arguments_take_an_empty_line() {
        for verb in [Verb::Validate, Verb::Genmeta] {
            for line in [&b""[..], b"  \t"] {
                super::parse(verb, line, &site()).unwrap();
            }
            for line in [&b"x"[..], b"--json", b"--help", b"'"] {
                let refused = super::parse(verb, line, &site()).unwrap_err();
                assert_eq!(refused.kind(), crate::error::ErrorKind::Usage);
                assert!(!refused.to_string().contains('\n'), "{refused}");
            }
        }
    }

    #[test]
    fn only_what_was_put_into_the_mount_is_cleared() {
        let ask = |line: &[u8]| super::parse(Verb::Backup, line, &site());
        let Ok(Request::BackupAndClear(options)) = ask(b"ingest --clear --tag x") else {
            panic!("not understood")
        };
        assert_eq!(options.source, site().ingest_dir);
        // What is removed has been read, whatever its times say.
        assert!(options.force_read);
        assert!(matches!(ask(b"ingest"), Ok(Request::Backup(it)) if !it.force_read));
        for line in [&b"/home/me --clear"[..], b"/c.ingest --clear", b"ingest --clear=1"] {
            let refused = ask(line).map(drop).unwrap_err();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{line:?}");
        }
    }

    #[test]
    fn a_refusal_is_one_line_that_says_what_is_wrong() {
        let said = |line: &[u8]| parse(line).unwrap_err().to_string();
        assert!(said(b"/a --nonsense").contains("--nonsense"));
        assert!(said(b"/a --max-workers 0").contains("--max-workers"));
        assert!(said(b"relative").contains("absolute"));
        assert!(said(b"").contains("what to back up"));
        assert!(said(b"/a /b").contains("/b"));
    }

    fn command_line(words: &[&str]) -> Result<backup::Options> {
        let parsed = BackupLine::try_parse_from(words);
        parsed.map_err(|e| Error::usage(e.to_string()))?.args.options()
    }

    #[test]
    fn a_line_is_the_argument_line_of_the_command() {
        let options =
            parse(b"/home/me/stuff --tag nightly --exclude '*.o' --comment 'a b'\n").unwrap();
        assert_eq!(options.source, Path::new("/home/me/stuff"));
        assert_eq!(options.tags, ["nightly"]);
        assert_eq!(options.comment, "a b");
        assert_eq!(options.rules.rules, [Rule::Exclude("*.o".into())]);
        let options = parse(b"'/with space/\xff' --exclude-if-present \xfe").unwrap();
        assert_eq!(options.source.as_os_str().as_bytes(), b"/with space/\xff");
        assert_eq!(options.rules.if_present, [OsString::from_vec(vec![0xfe])]);
        // As a shell script would write it.
        assert_eq!(parse(b"--tag x -- /-a").unwrap().source, Path::new("/-a"));
    }

    #[test]
    fn patterns_keep_their_order() {
        let line = b"--include c /s --exclude a --exclude-from /f --exclude=b --include d";
        let rules = parse(line).unwrap().rules;
        let (exclude, include) =
            (|it: &str| Rule::Exclude(it.into()), |it: &str| Rule::Include(it.into()));
        let from = Rule::ExcludeFrom("/f".into());
        assert_eq!(rules.rules, [include("c"), exclude("a"), from, exclude("b"), include("d")]);
        assert!(rules.only_plain_files);
    }

    #[test]
    fn ingest_stands_for_what_was_put_into_the_mount() {
        let options = parse(b"ingest --tag x").unwrap();
        assert_eq!(options.source, Path::new("/c.ingest"));
        assert_eq!(options.name.unwrap(), INGEST.as_bytes());
    }

    #[test]
    fn a_command_line_may_ask_for_a_stream() {
        let stream = |words: &[&str]| command_line(words).unwrap().stream.unwrap();
        assert_eq!(
            stream(&["--stdin", "--name", "a/b"]),
            Stream { file: "a/b".into(), input: Input::Stdin }
        );
        let asked = stream(&["--stdin-from-command", "--name", "a", "--", "pg_dump", "--all"]);
        assert_eq!(asked.input, Input::Command(vec!["pg_dump".into(), "--all".into()]));
        for words in [
            &["--stdin"][..],
            &["--stdin", "--name", "/a"],
            &["--stdin", "--name", "a", "/source"],
            &["--stdin", "--name", "a", "--", "command"],
            &["--stdin", "--stdin-from-command", "--name", "a", "--", "command"],
            &["--stdin-from-command", "--name", "a"],
            &["--stdin-from-command", "--name", "a", "command"],
            &["--stdin", "--name", "a", "--exclude", "b"],
            &["--stdin", "--name", "a", "--force-read"],
            &["/source", "--name", "a"],
            &["/source", "--", "more"],
            &["--", "/source", "more"],
            &[],
        ] {
            let refused = command_line(words).unwrap_err();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{words:?}");
        }
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            &b""[..],
            b"\n",
            b"--tag",
            b"relative",
            b"/a /b",
            b"'/a",
            b"/a --nonsense",
            b"/a\0",
            b"--stdin --name a",
            b"--stdin-from-command --name a -- true",
            b"/a --dry-run",
            b"/a --exclude-from relative",
            b"/a --exclude-larger-than much",
            b"/a --exclude [z-a]",
            b"/a --exclude-if-present b/c",
            b"/a --tag \xff",
            b"/a --comment \xff",
        ] {
            let refused = parse(line).unwrap_err();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{line:?}");
        }
    }

    #[test]
    fn sizes_are_binary_and_decimal() {
        assert_eq!(size("128MiB"), Ok(128 << 20));
        assert_eq!(size("1000"), Ok(1000));
        assert_eq!(size("1MB"), Ok(1_000_000));
        assert!(size("many").is_err());
    }
}
