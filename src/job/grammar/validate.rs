//! The arguments of `validate`, on the command line and in control files.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Parser};

use super::refused;
use crate::catalog::RunId;
use crate::error::Result;
use crate::validate::{Options, Sample};

/// The arguments of `validate`.
#[derive(Args, Clone, Debug, Default)]
pub struct ValidateArgs {
    /// Only this run: its entries, its manifest, and the blocks that it needs
    #[arg(long, value_name = "N")]
    run: Option<RunId>,
    /// Only this part of the blocks, chosen at random, as in 5%; the rest is checked as always
    #[arg(long, value_name = "P%", value_parser = percent)]
    sample: Option<f64>,
    /// Choose the same part as a validation before, which has said its number
    #[arg(long, value_name = "N", requires = "sample")]
    seed: Option<u64>,
    /// Begin no further block after this time, as in 90s, '2h 30m'; the block that was not verified
    /// for the longest time is the next, so that the next call goes on where this one has stopped
    #[arg(long, value_name = "T", value_parser = duration)]
    max_duration: Option<Duration>,
    /// Also read every file, and compare its hash
    #[arg(long)]
    files: bool,
}

#[derive(Parser)]
#[command(name = "validate", no_binary_name = true, disable_help_flag = true)]
struct ValidateLine {
    #[command(flatten)]
    args: ValidateArgs,
    /// Make what is bad good again
    #[arg(long)]
    repair: bool,
}

impl ValidateArgs {
    /// What the validation has to do, if the arguments go together.
    pub fn options(&self) -> Result<Options> {
        let seed = || self.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0 >> 32);
        let options = Options {
            run: self.run,
            sample: self.sample.map(|percent| Sample { percent, seed: seed() }),
            max_duration: self.max_duration,
            files: self.files,
        };
        options.check()?;
        Ok(options)
    }
}

/// Reads the words of a line: what to look at, and whether to repair what is found.
pub fn parse(words: Vec<OsString>) -> Result<(Options, bool)> {
    let line = ValidateLine::try_parse_from(words).map_err(refused)?;
    Ok((line.args.options()?, line.repair))
}

/// A part, with or without its sign: `5%`, `0.1`.
fn percent(text: &str) -> std::result::Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    let number = number.parse::<f64>().map_err(|e| e.to_string())?;
    match number > 0.0 && number <= 100.0 {
        true => Ok(number),
        false => Err("more than 0% and at most 100%".to_owned()),
    }
}

/// A length of time: `90s`, `2h30m`, `1 day`.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let duration = text.parse::<jiff::SignedDuration>().map_err(|e| e.to_string())?;
    Duration::try_from(duration).map_err(|_| "it is negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn read(line: &str) -> Result<Options> {
        parse(line.split_whitespace().map(OsString::from).collect()).map(|it| it.0)
    }

    #[test]
    fn a_repair_is_asked_for_by_a_word() {
        let read = |words: &[&str]| parse(words.iter().map(OsString::from).collect()).unwrap();
        assert!(read(&["--repair", "--run", "7"]).1 && !read(&["--run", "7"]).1);
    }

    #[test]
    fn options_are_read() {
        let none = read("").unwrap();
        assert_eq!((none.run, none.sample, none.max_duration), (None, None, None));
        assert!(!none.files);
        assert_eq!(read("--run 7 --files").unwrap().run, Some(7));
        let sample = |line| read(line).unwrap().sample.unwrap();
        assert_eq!(sample("--sample 2.5% --seed 9"), Sample { percent: 2.5, seed: 9 });
        assert_eq!(sample("--sample 100").percent, 100.0);
        for (text, secs) in [("0s", 0), ("90s", 90), ("2h30m", 9000), ("1h", 3600)] {
            let options = read(&format!("--max-duration {text}")).unwrap();
            assert_eq!(options.max_duration, Some(Duration::from_secs(secs)), "{text}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for line in [
            "x",
            "--json",
            "--sample 0",
            "--sample 101%",
            "--sample NaN",
            "--sample -1",
            "--seed 1",
            "--run x",
            "--max-duration",
            "--max-duration -3s",
            "--max-duration 5",
            "--max-duration 1h --run 1",
            "--max-duration 1h --sample 1%",
            "--max-duration 1h --files",
            "--sample 1% --files",
        ] {
            assert_eq!(read(line).unwrap_err().kind(), ErrorKind::Usage, "{line}");
        }
    }
}
