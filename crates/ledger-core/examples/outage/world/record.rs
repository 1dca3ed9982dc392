//! What is counted, second by second, and the figures made of it.

use super::{Micros, SECOND};

/// Goodput is looked at over so many seconds.
const STEADY: usize = 5;
/// It has come back when it is so large a part of the arrivals.
const RECOVERED: f64 = 0.95;
/// Retries need a moment to gather: amplification is counted from here on.
const SETTLED: u32 = 2;

/// Whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) from: u32,
    pub(crate) until: u32,
}

/// What a run was like. Each list has one entry per second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) arrivals: Vec<u32>,
    /// Calls that reached the backend, whatever became of them.
    pub(crate) attempts: Vec<u32>,
    /// Calls that succeeded while their callers waited.
    pub(crate) good: Vec<u32>,
    pub(crate) done: u32,
    /// Tasks whose retries were used up.
    pub(crate) failed: u32,
    /// Tasks that were neither at the end.
    pub(crate) waiting: u32,
}

impl Record {
    pub(crate) fn new(seconds: u32) -> Self {
        let zeros = vec![0; seconds as usize];
        Self { arrivals: zeros.clone(), attempts: zeros.clone(), good: zeros, done: 0, failed: 0, waiting: 0 }
    }

    pub(super) fn arrived(&mut self, at: Micros) {
        self.arrivals[second(at)] += 1;
    }

    pub(super) fn called(&mut self, at: Micros) {
        self.attempts[second(at)] += 1;
    }

    pub(super) fn done(&mut self, at: Micros) {
        self.good[second(at)] += 1;
        self.done += 1;
    }

    /// Calls per arrival, from two seconds into the fault until its end.
    pub(crate) fn amplification(&self, fault: Span) -> f64 {
        ratio(&self.attempts, &self.arrivals, Span { from: fault.from + SETTLED, ..fault })
    }

    /// The most calls in one second, as a multiple of `base`.
    pub(crate) fn peak(&self, base: f64) -> f64 {
        f64::from(self.attempts.iter().copied().max().unwrap_or(0)) / base
    }

    /// Seconds from the end of the fault until goodput keeps up with arrivals, and does so to the end; none when it never
    /// does.
    pub(crate) fn recovers_after(&self, fault: Span) -> Option<u32> {
        let sum = |list: &[u32], from| f64::from(list[from..from + STEADY].iter().sum::<u32>());
        let keeps_up = |from: &usize| sum(&self.good, *from) >= RECOVERED * sum(&self.arrivals, *from);
        let windows = fault.until as usize..(self.good.len() + 1).saturating_sub(STEADY);
        let steady = windows.rev().take_while(keeps_up).last()?;
        u32::try_from(steady).ok()?.checked_sub(fault.until)
    }
}

fn ratio(of: &[u32], to: &[u32], span: Span) -> f64 {
    let sum = |list: &[u32]| f64::from(list[span.from as usize..span.until as usize].iter().sum::<u32>());
    sum(of) / sum(to)
}

fn second(at: Micros) -> usize {
    usize::try_from(at / SECOND).expect("it fits")
}
