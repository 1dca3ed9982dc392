//! What people see while the demo runs, on standard error: events as lines, and below them a bar and a line for each
//! agent. Without a terminal there is nothing to draw on, and the state is a plain line every two seconds.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::time::Instant;

use crate::output::remark;

/// How often the state is told without a terminal.
const PLAIN: Duration = Duration::from_secs(2);

/// The counts of one agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) agent: &'static str,
    pub(super) breaker: &'static str,
    pub(super) done: u64,
    pub(super) running: u64,
    pub(super) waiting: u64,
    pub(super) retry: u64,
    pub(super) blocked: u64,
}

/// Where events and the state are shown.
pub(super) struct Screen {
    start: Instant,
    drawn: Option<Drawn>,
    /// When the state was last told in a plain line.
    told: Mutex<Option<Instant>>,
}

struct Drawn {
    all: MultiProgress,
    bar: ProgressBar,
    lines: Vec<ProgressBar>,
}

impl Screen {
    /// A screen for so many agents, and a clock that starts now.
    pub(super) fn new(agents: usize) -> Self {
        let drawn = std::io::stderr().is_terminal().then(|| Drawn::new(agents));
        Self { start: Instant::now(), drawn, told: Mutex::new(None) }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// A line that stays.
    pub(super) fn say(&self, text: &str) {
        match &self.drawn {
            // Suspends the bar while it prints.
            Some(drawn) => drawn.all.suspend(|| remark(text)),
            None => remark(text),
        }
    }

    /// Something that happened, with its time.
    pub(super) fn event(&self, text: &str) {
        self.say(&format!("{:5.1} s  {text}", self.elapsed().as_secs_f64()));
    }

    /// The state of things, of so many tasks.
    pub(super) fn state(&self, tasks: u64, lines: &[Line]) {
        let done: u64 = lines.iter().map(|line| line.done).sum();
        if let Some(drawn) = &self.drawn {
            drawn.bar.set_length(tasks);
            drawn.bar.set_position(done);
            for (bar, line) in drawn.lines.iter().zip(lines) {
                bar.set_message(describe(line));
            }
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() >= PLAIN) {
            *told = Some(Instant::now());
            let agents: Vec<String> =
                lines.iter().map(|line| format!("{} {} ({})", line.agent, line.done, line.breaker)).collect();
            self.event(&format!("{done} of {tasks} done: {}", agents.join(", ")));
        }
    }

    /// Takes away what was drawn.
    pub(super) fn end(&self) {
        if let Some(drawn) = &self.drawn {
            drawn.bar.finish_and_clear();
            drawn.lines.iter().for_each(ProgressBar::finish_and_clear);
            // What cannot be drawn any more is gone as well.
            let _ = drawn.all.clear();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.end();
    }
}

impl Drawn {
    fn new(agents: usize) -> Self {
        let all = MultiProgress::new();
        let style =
            |template: &str| ProgressStyle::with_template(template).expect("the template is well-formed");
        let bar = all.add(ProgressBar::new(0).with_style(style("{bar:48} {pos} of {len} done, {elapsed}")));
        let lines =
            (0..agents).map(|_| all.add(ProgressBar::new(0).with_style(style("{wide_msg}")))).collect();
        Self { all, bar, lines }
    }
}

fn describe(line: &Line) -> String {
    let Line { agent, breaker, done, running, waiting, retry, blocked } = line;
    format!(
        "{agent:<10}  {breaker:<9}  done {done:>4}  running {running:>3}  waiting {waiting:>4}  retry {retry:>3}  \
         blocked {blocked:>3}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_as_wide_whatever_it_counts() {
        let line = Line { agent: "digest", breaker: "CLOSED", ..Line::default() };
        let other = Line { agent: "statistics", done: 9_999, running: 12, retry: 100, ..line };
        assert_eq!(describe(&line).len(), describe(&other).len());
        assert!(
            describe(&line).starts_with("digest      CLOSED     done    0  running"),
            "{}",
            describe(&line)
        );
    }
}
