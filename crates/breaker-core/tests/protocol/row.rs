//! The shared row, and all that is done to it: the real machine, restored from the row and stored again in each
//! transaction.
//!
//! The only file of the model that knows what a snapshot holds. Rows are kept in a normal form, so that two of them are
//! equal when nothing that comes later can tell them apart: it is always the same time, what lies in the past lies now, and
//! epochs are numbered from the present one: [`NEWEST`], or [`OLDER`] for each that is over. That is enough, since an
//! epoch is only ever compared with the row's.

use breaker_core::{Availability, Breaker, Config, Permit, Sample, Snapshot, State, Stats};
use std::time::Duration;

/// The unit of the abstract clock.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// It is always now. Time passes by moving all that is stored back by a tick.
const NOW: Duration = Duration::from_secs(1_000);
pub(crate) const NEWEST: u64 = 1;
pub(crate) const OLDER: u64 = 0;

/// A row in its normal form, as a store keeps it or a replica remembers it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row(Snapshot);

impl Row {
    pub(crate) fn new(config: Config) -> Self {
        let breaker = Breaker::new(config).expect("valid");
        Self::of(
            &Breaker::restore(Snapshot { epoch: NEWEST, ..breaker.snapshot() }, config, NOW).expect("valid"),
        )
    }

    fn machine(&self, config: Config) -> Breaker {
        Breaker::restore(self.0.clone(), config, NOW).expect("valid")
    }

    /// Without what decides nothing here: statistics, and reopenings, which with a multiplier of 1 count for nothing.
    fn of(machine: &Breaker) -> Self {
        let row = machine.snapshot();
        let until = row.until.map(|until| until.max(NOW));
        Self(Snapshot { since: NOW, until, reopens: 0, cause: None, stats: Stats::default(), ..row })
    }

    /// One transaction. The epoch after it is not yet the newest by number: see [`renumber`](Self::renumber).
    pub(crate) fn transact<T>(
        &mut self,
        config: Config,
        work: impl FnOnce(&mut Breaker, Duration) -> T,
    ) -> T {
        let mut machine = self.machine(config);
        let result = work(&mut machine, NOW);
        *self = Self::of(&machine);
        result
    }

    pub(crate) fn availability(&self, config: Config) -> Availability {
        self.machine(config).is_available(NOW)
    }

    pub(crate) fn state(&self) -> State {
        self.0.state
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// Closed, and no failure since the last success: a success would change nothing.
    pub(crate) fn is_clean(&self) -> bool {
        self.0.state == State::Closed && self.0.run == 0
    }

    /// Half-open has lasted its longest, and nobody has looked since.
    pub(crate) fn is_overdue(&self) -> bool {
        self.0.state == State::HalfOpen && self.0.until == Some(NOW)
    }

    /// Time passes.
    pub(crate) fn age(&mut self) {
        self.0.until = self.0.until.map(|until| until.saturating_sub(TICK).max(NOW));
    }

    /// Numbers its slots anew, for they are all alike, and tells the numbers they had, in the order of the new ones.
    pub(crate) fn renumber_slots(&mut self) -> Vec<u8> {
        let had = self.0.probes.iter().map(|probe| probe.slot).collect();
        for (number, probe) in (0..).zip(&mut self.0.probes) {
            probe.slot = number;
        }
        had
    }

    /// Numbers the epoch, knowing the store's.
    pub(crate) fn renumber(&mut self, newest: u64) {
        self.0.epoch = if self.0.epoch == newest { NEWEST } else { OLDER };
    }

    /// Of a row of an older epoch a replica only believes that it may make a call, or a probe, now or soon. It will be
    /// told better either way, so it makes no difference if it tries soon.
    pub(crate) fn forget(&mut self, config: Config) {
        if self.0.epoch == OLDER {
            let closed = Self::new(config).0;
            let yes = self.availability(config) == Availability::Yes;
            let (state, until) = if yes { (State::Closed, None) } else { (State::Open, Some(NOW)) };
            self.0 = Snapshot { epoch: OLDER, state, until, ..closed };
        }
    }

    /// The row as numbers, for the identity of a state.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let small = |number: u32| u8::try_from(number).expect("the model's numbers are small");
        let ticks = |until: Duration| 1 + small(u32::try_from((until - NOW).as_secs()).expect("small"));
        out.extend([
            self.0.state as u8,
            u8::from(self.0.epoch == NEWEST),
            small(self.0.run),
            small(self.0.successes),
            u8::try_from(self.0.probes.len()).expect("small"),
            self.0.until.map_or(0, ticks),
        ]);
    }
}

/// The slot of a probe that has none any more.
const GONE: u8 = u8::MAX;

/// As [`Row::renumber`] and [`Row::renumber_slots`].
pub(crate) fn renumbered(permit: Permit, newest: u64, slots: &[u8]) -> Permit {
    let slot = match slots.iter().position(|had| *had == permit.slot) {
        _ if !permit.probe => 0,
        Some(number) if permit.epoch == newest => u8::try_from(number).unwrap_or(GONE),
        _ => GONE,
    };
    Permit { epoch: if permit.epoch == newest { NEWEST } else { OLDER }, slot, ..permit }
}

/// What a breaker without the fence takes a result for: one of the present epoch.
pub(crate) fn unfenced(row: &Row) -> Permit {
    let slot = row.0.probes.first().map_or(GONE, |probe| probe.slot);
    Permit { epoch: row.epoch(), probe: row.state() == State::HalfOpen, slot }
}

/// A permit from a replica that did not look at the row.
pub(crate) fn unchecked(epoch: u64, probe: bool) -> Permit {
    Permit { epoch, probe, slot: if probe { GONE } else { 0 } }
}

/// A permit as a number, for the identity of a state.
pub(crate) fn number(permit: Option<Permit>) -> u8 {
    let gone = |permit: Permit| u8::from(permit.probe && permit.slot == GONE);
    permit.map_or(0, |permit| {
        1 + gone(permit) * 4 + u8::from(permit.epoch == NEWEST) * 2 + u8::from(permit.probe)
    })
}

/// The row after time alone has done its work.
pub(crate) fn ticked(row: &Row, config: Config) -> Row {
    let mut row = row.clone();
    row.transact(config, |machine, now| machine.tick(now, 0));
    row
}

/// Records how a call ended.
pub(crate) fn record(row: &mut Row, config: Config, permit: Permit, sample: Sample) {
    row.transact(config, |machine, now| {
        let _ = machine.record(permit, sample, now, 0);
    });
}
