//! The log of a job: lines for people, which can be read while they are written.
//!
//! Lines are only added, so an offset means the same for as long as the job is remembered. Bounded:
//! what does not fit is counted, and the count is said at the end.

use parking_lot::Mutex;

use crate::sys::Time;

/// Lines that a log takes.
pub const LINES_MAX: usize = 10_000;
/// Bytes that it takes.
const BYTES_MAX: usize = 1 << 20;
/// Longest line, in bytes.
const LINE_BYTES_MAX: usize = 32 << 10;
/// What is kept of a log after its job: its beginning and its end, in bytes.
const KEPT_HEAD_BYTES: usize = 48 << 10;
const KEPT_TAIL_BYTES: usize = 16 << 10;

/// A log.
#[derive(Default)]
pub struct Log(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    text: Vec<u8>,
    count: usize,
    left_out: u64,
}

impl Log {
    /// Adds a line, if there is room.
    pub fn add(&self, text: &str) {
        let mut lines = self.0.lock();
        let is_full = lines.count >= LINES_MAX || lines.text.len() + text.len() + 40 > BYTES_MAX;
        if is_full || lines.left_out > 0 {
            lines.left_out += 1;
            if lines.left_out == 1 {
                lines.put("the log is full: what follows is only counted");
            }
            return;
        }
        lines.put(text);
    }

    /// Adds the last lines, for which there is always room.
    pub fn end(&self, last: &[String]) {
        let mut lines = self.0.lock();
        if lines.left_out > 0 {
            let text = format!("{} lines were left out", lines.left_out);
            lines.put(&text);
        }
        last.iter().for_each(|it| lines.put(it));
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.0.lock().text.len() as u64
    }

    /// At most `size` bytes from `offset` on; none where there are none yet.
    pub fn read(&self, offset: u64, size: usize) -> Vec<u8> {
        part(&self.0.lock().text, offset, size)
    }

    /// What is kept of it.
    pub fn kept(&self) -> String {
        let text = String::from_utf8_lossy(&self.0.lock().text).into_owned();
        if text.len() <= KEPT_HEAD_BYTES + KEPT_TAIL_BYTES {
            return text;
        }
        let (mut head, mut tail) = (String::new(), std::collections::VecDeque::new());
        let (mut left_out, mut tail_bytes, mut in_head) = (0, 0, true);
        for line in text.split_inclusive('\n') {
            in_head &= head.len() + line.len() <= KEPT_HEAD_BYTES;
            if in_head {
                head.push_str(line);
                continue;
            }
            tail.push_back(line);
            tail_bytes += line.len();
            while tail_bytes > KEPT_TAIL_BYTES
                && let Some(first) = tail.pop_front()
            {
                tail_bytes -= first.len();
                left_out += 1;
            }
        }
        head.push_str(&format!("({left_out} lines are not kept)\n"));
        head.extend(tail);
        head
    }
}

impl Lines {
    fn put(&mut self, text: &str) {
        let mut end = text.len().min(LINE_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = text.get(..end).unwrap_or_default();
        self.text.extend_from_slice(format!("{} {text}\n", clock(Time::now())).as_bytes());
        self.count += 1;
    }
}

/// A moment, to the second, in UTC.
pub fn clock(time: Time) -> String {
    match jiff::Timestamp::from_second(time.secs) {
        Ok(stamp) => stamp.to_string(),
        Err(_) => format!("@{}", time.secs),
    }
}

/// The part of a text that a read asks for.
pub fn part(text: &[u8], offset: u64, size: usize) -> Vec<u8> {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
    let to = from.saturating_add(size).min(text.len());
    text.get(from..to).unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(log: &Log) -> String {
        String::from_utf8(log.read(0, usize::MAX)).unwrap()
    }

    #[test]
    fn what_was_read_stays_where_it_is() {
        let log = Log::default();
        log.add("one");
        let first = log.read(0, usize::MAX);
        assert_eq!(first.len() as u64, log.len());
        assert_eq!(log.read(log.len(), 9), b"");
        assert_eq!(log.read(u64::MAX, usize::MAX), b"");
        log.add("two");
        assert!(log.read(0, usize::MAX).starts_with(&first));
        assert!(text(&log).ends_with(" two\n"));
    }

    #[test]
    fn a_full_log_says_so_and_still_has_an_end() {
        let log = Log::default();
        for n in 0..LINES_MAX + 7 {
            log.add(&n.to_string());
        }
        log.end(&["over".to_owned()]);
        let text = text(&log);
        assert_eq!(text.lines().count(), LINES_MAX + 3);
        assert_eq!(text.matches("the log is full").count(), 1);
        assert!(text.contains(" 7 lines were left out\n"), "{}", &text[text.len() - 200..]);
        assert!(text.ends_with(" over\n"));
        let log = Log::default();
        for _ in 0..100 {
            log.add(&"x".repeat(1 << 20));
        }
        assert!(log.len() < BYTES_MAX as u64 + 200);
        assert!(log.kept().len() < KEPT_HEAD_BYTES + KEPT_TAIL_BYTES + 200);
    }

    #[test]
    fn the_beginning_and_the_end_are_kept() {
        let log = Log::default();
        for n in 0..5000 {
            log.add(&format!("line {n}"));
        }
        let (kept, text) = (log.kept(), text(&log));
        assert!(kept.len() < KEPT_HEAD_BYTES + KEPT_TAIL_BYTES + 100);
        assert!(kept.contains(" line 0\n") && kept.ends_with(" line 4999\n"));
        let (lines, gap) = (text.lines().count(), "lines are not kept");
        let left_out: usize = kept.lines().find(|it| it.contains(gap)).unwrap()[1..]
            .split(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(kept.lines().count() - 1 + left_out, lines);
        let short = Log::default();
        short.add("x");
        assert_eq!(short.kept().as_bytes(), short.read(0, 999));
    }
}
