//! Progress bars: drawn on standard error when that is a terminal, from the counters of the work.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::progress::Progress;

/// How often a bar is drawn anew.
const TICK: Duration = Duration::from_millis(100);

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
    if !std::io::stderr().is_terminal() {
        return work();
    }
    let done = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let drawing = scope.spawn({
            let done = done.clone();
            move || draw(progress, &done)
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        drawing.thread().unpark();
        result
    })
}

fn draw(progress: &Progress, done: &AtomicBool) {
    let bar = ProgressBar::new_spinner();
    let known = ProgressStyle::with_template(
        "{spinner} {prefix} {bar:24} {binary_bytes}/{binary_total_bytes} \
         {binary_bytes_per_sec} {msg} eta {eta}",
    );
    let unknown = ProgressStyle::with_template(
        "{spinner} {prefix} {binary_bytes} {binary_bytes_per_sec} {msg} {elapsed}",
    );
    let (Ok(known), Ok(unknown)) = (known, unknown) else { return };
    bar.set_style(unknown);
    while !done.load(Ordering::Relaxed) {
        let bytes = Progress::get(&progress.bytes);
        let total = Progress::get(&progress.bytes_total);
        if total >= bytes && total > 0 {
            if bar.length() != Some(total) {
                bar.set_style(known.clone());
                bar.set_length(total);
            }
        } else if bar.length().is_some() {
            bar.unset_length();
        }
        bar.set_position(bytes);
        bar.set_prefix(progress.phase());
        let entries = Progress::get(&progress.entries);
        let stored = Progress::get(&progress.bytes_stored);
        let stored = match stored {
            0 => String::new(),
            n => format!(", {} stored", bytesize::ByteSize(n)),
        };
        bar.set_message(format!("{entries} done{stored}"));
        bar.tick();
        std::thread::park_timeout(TICK);
    }
    bar.finish_and_clear();
}
