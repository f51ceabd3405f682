//! Progress: a bar on standard error when that is a terminal, a line in the log now and then when
//! it is not and more was asked for (`-v`).
//!
//! Drawn from the counters of the work, which does not wait for it. Rates and the time that is left
//! are indicatif's; no time is given while nobody knows how much there is.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{show, terminal};
use crate::progress::{Counters, Progress};

/// How often a bar is drawn anew.
const TICK: Duration = Duration::from_millis(100);
/// How often a line is written where there is no bar.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Does `work` while a bar shows its progress. The first interrupt asks the work to stop; a second
/// one ends the process.
pub fn with_bar<T>(progress: &Progress, work: impl FnOnce() -> T) -> T {
    let flag = progress.cancel_flag();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // Registered in this order, a second signal finds the flag set and ends the process. If
        // either fails, the signal does what it does by default.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone());
        let _ = signal_hook::flag::register(signal, flag.clone());
    }
    let is_terminal = std::io::stderr().is_terminal();
    if !is_terminal && !log::log_enabled!(log::Level::Info) {
        return work();
    }
    let done = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let drawing = scope.spawn({
            let done = done.clone();
            move || match is_terminal {
                true => draw(progress, &done),
                false => tell(progress, &done),
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        drawing.thread().unpark();
        result
    })
}

fn draw(progress: &Progress, done: &AtomicBool) {
    let bar = ProgressBar::no_length();
    let known = ProgressStyle::with_template(
        "{spinner} {prefix} {bar:24} {binary_bytes}/{binary_total_bytes} \
         {binary_bytes_per_sec} {msg} eta {eta}",
    );
    let unknown = ProgressStyle::with_template(
        "{spinner} {prefix} {binary_bytes} {binary_bytes_per_sec} {msg} {elapsed}",
    );
    let (Ok(known), Ok(unknown)) = (known, unknown) else { return };
    bar.set_style(unknown.clone());
    while !done.load(Ordering::Relaxed) {
        terminal::unless_asking(|| {
            let had_total = bar.length().is_some();
            let counters = update(&bar, progress);
            match (had_total, counters.bytes_total.is_some()) {
                (false, true) => bar.set_style(known.clone()),
                (true, false) => bar.set_style(unknown.clone()),
                _ => {}
            }
            bar.set_prefix(progress.phase());
            bar.set_message(message(progress.phase(), &counters));
            bar.tick();
        });
        std::thread::park_timeout(TICK);
    }
    bar.finish_and_clear();
}

/// Writes a line into the log now and then.
fn tell(progress: &Progress, done: &AtomicBool) {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    let mut last = Instant::now();
    while !done.load(Ordering::Relaxed) {
        let counters = update(&bar, progress);
        bar.tick();
        if last.elapsed() >= LINE_EVERY {
            last = Instant::now();
            log::info!("{}", line(progress.phase(), &bar, &counters));
        }
        // A rate is taken from many moments, not from one every ten seconds.
        std::thread::park_timeout(10 * TICK);
    }
}

/// Puts the counters into a bar, whose length is what there is to do, if that is known.
fn update(bar: &ProgressBar, progress: &Progress) -> Counters {
    let counters = progress.counters();
    match counters.bytes_total {
        Some(total) => bar.set_length(total),
        None => bar.unset_length(),
    }
    bar.set_position(counters.bytes);
    counters
}

/// `backing up: 3.0 GiB of 4.5 GiB, 120.0 MiB/s, 1200 files, …, eta 12s`.
fn line(phase: &str, bar: &ProgressBar, counters: &Counters) -> String {
    let total = counters.bytes_total.map(|it| format!(" of {}", show::bytes(it)));
    let eta = match counters.bytes_total {
        Some(_) => format!(", eta {}", indicatif::HumanDuration(bar.eta())),
        None => String::new(),
    };
    format!(
        "{phase}: {}{}, {}/s, {}{eta}",
        show::bytes(counters.bytes),
        total.unwrap_or_default(),
        indicatif::BinaryBytes(rate(bar.per_sec())),
        message(phase, counters)
    )
}

/// A rate in whole bytes.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rate(per_second: f64) -> u64 {
    // Saturates, and is 0 for what is no number.
    per_second as u64
}

/// `1200 files, dedup 1.50, compression 2.00, 1.0 GiB stored`.
fn message(phase: &str, counters: &Counters) -> String {
    let things = if phase.starts_with("checking") { "blocks" } else { "files" };
    let mut text = format!("{} {things}", counters.entries);
    for (word, ratio) in
        [("dedup", counters.dedup_ratio()), ("compression", counters.compression_ratio())]
    {
        if let Some(ratio) = ratio {
            text.push_str(&format!(", {word} {ratio:.2}"));
        }
    }
    if counters.bytes_stored > 0 {
        text.push_str(&format!(", {} stored", show::bytes(counters.bytes_stored)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_known() {
        let progress = Progress::default();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let said = || line("backing up", &bar, &update(&bar, &progress));
        assert_eq!(said(), "backing up: 0 B, 0 B/s, 0 files");
        Progress::add(&progress.bytes_total, 1 << 30);
        Progress::add(&progress.bytes, 3 << 20);
        Progress::add(&progress.bytes_read, 3 << 20);
        Progress::add(&progress.bytes_new, 2 << 20);
        Progress::add(&progress.bytes_stored, 1 << 20);
        Progress::add(&progress.entries, 7);
        let text = said();
        assert!(text.starts_with("backing up: 3.0 MiB of 1.0 GiB, "), "{text}");
        let ratios = "/s, 7 files, dedup 1.50, compression 2.00, 1.0 MiB stored, eta ";
        assert!(text.contains(ratios), "{text}");
        Progress::add(&progress.bytes, 1 << 30);
        let text = said();
        assert!(text.starts_with("backing up: 1.0 GiB, ") && !text.contains("eta"), "{text}");
        assert_eq!(bar.length(), None);
    }
}
