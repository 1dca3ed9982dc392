//! A small world around `Task::apply`: one ledger, many workers, and a network that loses, repeats and delays.
//!
//! Seeded: what fails prints its seed, and `LEDGER_SIMULATION_SEED` runs that one alone. No time passes but the world's.

mod ledger;
mod workers;

use crate::support::{START, seconds};
use ledger::Ledger;
use ledger_core::{EventKind, Now, Outcome, TaskId, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use workers::Workers;

const SEEDS: u64 = 1_000;
const CHAOS: u32 = 600;
/// Far more than healing takes: 20 idle deliveries of 30 s each are the longest of all bounds.
const HEALING: u32 = 6_000;

/// Said by a worker to the ledger.
#[derive(Clone, Debug)]
enum Up {
    Hello,
    Ack(TaskId, u64),
    Beat(Vec<(TaskId, u64)>),
    Outcome(TaskId, u64, Outcome, u64),
}

/// Said by the ledger to a worker.
#[derive(Clone, Debug)]
enum Down {
    Assignment(TaskId, u64),
    /// Settled, or never to be: the worker may forget it.
    Receipt(TaskId, u64),
    Stop(TaskId, u64),
    /// This lease is gone.
    Lost(TaskId, u64),
}

#[derive(Clone, Debug)]
enum Message {
    Up { worker: usize, incarnation: u64, up: Up },
    Down { worker: usize, incarnation: u64, down: Down },
}

/// splitmix64: all the chance there is in this world.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Loses, repeats and delays, until it is healed.
struct Network {
    under_way: BTreeMap<(Timestamp, u64), Message>,
    sent: u64,
    healed: bool,
}

impl Network {
    fn send(&mut self, message: &Message, now: Timestamp, dice: &mut Dice) {
        let copies = if self.healed { 1 } else { [0, 1, 1, 1, 1, 1, 1, 2][dice.below(8) as usize] };
        for _ in 0..copies {
            let late = if !self.healed && dice.one_in(20) { 200_000 } else { 200 };
            self.sent += 1;
            let at = now.after(Duration::from_millis(dice.below(late)));
            self.under_way.insert((at, self.sent), message.clone());
        }
    }

    fn arrived(&mut self, now: Timestamp) -> Option<Message> {
        let first = *self.under_way.first_key_value().filter(|((at, _), _)| *at <= now)?.0;
        self.under_way.remove(&first)
    }
}

/// Says which seed it was when a test falls.
struct OnFailure(u64);

impl Drop for OnFailure {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the world of seed {0} fell: LEDGER_SIMULATION_SEED={0}", self.0);
        }
    }
}

/// Lives one world to its end, and says what kinds of rows it saw.
fn world(seed: u64) -> BTreeSet<EventKind> {
    let _says = OnFailure(seed);
    let mut dice = Dice(seed);
    let mut network = Network { under_way: BTreeMap::new(), sent: 0, healed: false };
    let mut ledger = Ledger::new(&mut dice);
    let mut workers = Workers::new(4);
    // The network and the workers live on a time of their own: only the ledger's clock is set about.
    let mut real = START;
    for step in 0..CHAOS + HEALING {
        let healed = step >= CHAOS;
        network.healed = healed;
        real = real.after(Duration::from_millis(dice.below(4_000)));
        ledger.now.at = ledger.now.at.max(real);
        if !healed && dice.one_in(50) {
            ledger.now = match dice.below(3) {
                0 => Now { at: ledger.now.at.before(seconds(dice.below(90))), skew: ledger.now.skew },
                1 => Now { at: ledger.now.at.after(seconds(dice.below(90))), skew: ledger.now.skew },
                _ => Now { at: ledger.now.at, skew: dice.below(600_000) as i64 - 300_000 },
            };
        }
        while let Some(message) = network.arrived(real) {
            match message {
                Message::Up { worker, incarnation, up } => {
                    for down in ledger.hears(worker, incarnation, &up) {
                        network.send(&Message::Down { worker, incarnation, down }, real, &mut dice);
                    }
                }
                Message::Down { worker, incarnation, down } => workers.hears(worker, incarnation, &down),
            }
        }
        if !healed {
            workers.fate(&mut dice);
            ledger.users(&mut dice);
        }
        for message in workers.work(healed, &mut dice) {
            network.send(&message, real, &mut dice);
        }
        for message in ledger.passes_time(healed, &mut dice) {
            network.send(&message, real, &mut dice);
        }
        ledger.keeps_its_rules();
        if healed && ledger.all_ended() {
            return ledger.kinds();
        }
    }
    panic!("some tasks never ended:\n{}", ledger.unfinished());
}

#[test]
fn whatever_happens_every_task_ends_once_the_world_is_healed() {
    if let Some(seed) = std::env::var("LEDGER_SIMULATION_SEED").ok().and_then(|seed| seed.parse().ok()) {
        world(seed);
        return;
    }
    let seen: BTreeSet<_> = (0..SEEDS).flat_map(world).collect();
    // Nobody discards here, no world lasts a day, and twenty idle deliveries in a row are rare; without the rest these
    // worlds were too kind.
    let missing: Vec<_> = EventKind::ALL.iter().filter(|kind| !seen.contains(kind)).collect();
    let rare =
        [EventKind::Undeliverable, EventKind::Discarded, EventKind::BudgetExpired, EventKind::Restored];
    assert!(missing.iter().all(|kind| rare.contains(kind)), "{missing:?}");
}
