//! The goals: what is asked of a ledger, and whether it was reached.

use serde::Serialize;

use crate::bench::waiting::median;
use crate::failure::{Exit, Failure};
use crate::output::{print, remark};

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
pub(in crate::bench) struct Row {
    pub(in crate::bench) goal: &'static str,
    pub(in crate::bench) what: &'static str,
    /// What a value is: a share of the yardstick, times the yardstick, or a plain unit.
    pub(in crate::bench) unit: &'static str,
    pub(in crate::bench) floor: f64,
    pub(in crate::bench) stretch: f64,
    /// Median of the rounds.
    pub(in crate::bench) measured: f64,
    pub(in crate::bench) lowest: f64,
    pub(in crate::bench) highest: f64,
    pub(in crate::bench) held: bool,
    /// One for each round.
    pub(in crate::bench) values: Vec<f64>,
}

/// What is asked, before it is measured.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Goal {
    pub(in crate::bench) goal: &'static str,
    pub(in crate::bench) what: &'static str,
    pub(in crate::bench) unit: &'static str,
    /// Where the stretch is above it, more is better.
    pub(in crate::bench) floor: f64,
    pub(in crate::bench) stretch: f64,
}

impl Goal {
    pub(in crate::bench) fn met(self, values: Vec<f64>) -> Row {
        let measured = median(values.clone());
        let more = self.stretch > self.floor;
        Row {
            goal: self.goal,
            what: self.what,
            unit: self.unit,
            floor: self.floor,
            stretch: self.stretch,
            measured: rounded(measured),
            lowest: rounded(values.iter().copied().fold(f64::INFINITY, f64::min)),
            highest: rounded(values.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            held: if more { measured >= self.floor } else { measured <= self.floor },
            values: values.into_iter().map(rounded).collect(),
        }
    }
}

/// The goals that are measured in a run.
#[derive(Debug)]
pub(in crate::bench) struct Goals<'a> {
    /// Only those with the first words of one of these; with none, all.
    only: &'a [String],
    known: &'static [&'static str],
    pub(in crate::bench) rows: Vec<Row>,
}

impl<'a> Goals<'a> {
    /// # Errors
    /// One of `only` names none of those that there are.
    pub(in crate::bench) fn of(only: &'a [String], known: &'static [&'static str]) -> Result<Self, Failure> {
        match only.iter().find(|only| !known.iter().any(|goal| names(only, goal))) {
            None => Ok(Self { only, known, rows: Vec::new() }),
            Some(only) => {
                let what = format!("there is no goal {only:?}; there are {}", known.join(", "));
                Err(Failure::usage(what))
            }
        }
    }

    pub(in crate::bench) fn wants(&self, goals: &[&str]) -> bool {
        debug_assert!(goals.iter().all(|goal| self.known.contains(goal)), "{goals:?} are not all known");
        let wanted =
            self.only.is_empty() || goals.iter().any(|goal| self.only.iter().any(|only| names(only, goal)));
        if wanted {
            remark(&format!("measuring {}", goals.join(", ")));
        }
        wanted
    }

    pub(in crate::bench) fn row(
        &mut self,
        goal: &'static str,
        what: &'static str,
        unit: &'static str,
        (floor, stretch): (f64, f64),
        values: Vec<f64>,
    ) {
        self.rows.push(Goal { goal, what, unit, floor, stretch }.met(values));
    }
}

/// Whether one is the other or its first words.
fn names(only: &str, goal: &str) -> bool {
    only.split_whitespace().zip(goal.split(' ')).all(|(one, other)| one == other) && !only.trim().is_empty()
}

/// Prints a report, and its rows for who reads along; an error where one was missed.
pub(in crate::bench) fn tell(report: &impl Serialize, rows: &[Row]) -> Result<(), Failure> {
    remark(table(rows).trim_end());
    let mut text = serde_json::to_string(report).expect("numbers and text have a JSON form");
    text.push('\n');
    print(&text)?;
    let missed: Vec<_> = rows.iter().filter(|row| !row.held).map(|row| row.goal).collect();
    if missed.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Exit::Failure, format!("below their floor: {}", missed.join(", "))))
}

/// To four digits.
pub(in crate::bench) fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let factor = 10_f64.powi(3 - value.abs().log10().floor() as i32);
    (value * factor).round() / factor
}

/// A Markdown table of the rows.
fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| goal | what | floor | stretch | measured | lowest to highest | |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let unit = row.unit;
        let verdict = match row.held {
            false => "MISSED",
            true if (row.stretch > row.floor) == (row.measured >= row.stretch) => "stretch",
            true => "floor",
        };
        out.push_str(&format!(
            "| {} | {} | {}{unit} | {}{unit} | **{}**{unit} | {} to {} | {verdict} |\n",
            row.goal, row.what, row.floor, row.stretch, row.measured, row.lowest, row.highest
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MORE: Goal = Goal { goal: "G", what: "w", unit: "", floor: 0.6, stretch: 1.2 };
    const LESS: Goal = Goal { goal: "G", what: "w", unit: " ms", floor: 5.0, stretch: 1.0 };

    #[test]
    fn the_median_decides_in_the_direction_of_the_stretch() {
        assert!(MORE.met(vec![0.5, 0.6, 2.0]).held);
        assert!(!MORE.met(vec![0.5, 0.59, 2.0]).held);
        assert!(LESS.met(vec![9.0, 5.0, 1.0]).held);
        assert!(!LESS.met(vec![9.0, 5.1, 1.0]).held);
    }

    #[test]
    fn a_table_names_what_was_missed_and_what_was_reached() {
        let table =
            table(&[MORE.met(vec![1.3]), MORE.met(vec![0.7]), LESS.met(vec![6.0]), LESS.met(vec![0.9])]);
        let verdicts: Vec<_> =
            table.lines().skip(2).filter_map(|line| line.split('|').rev().nth(1)).collect();
        assert_eq!(verdicts, [" stretch ", " floor ", " MISSED ", " stretch "]);
        assert!(table.contains("| 5 ms | 1 ms | **6** ms | 6 to 6 |"), "{table}");
    }

    #[test]
    fn a_goal_is_named_by_its_words() {
        let known: &[&str] = &["G1", "G11", "G14 bulk", "G14 unary", "lost spans"];
        let wanted = |only: &str| {
            let only = [only.to_owned()];
            let goals = Goals::of(&only, known).expect("it is known");
            known.iter().copied().filter(|goal| goals.wants(&[goal])).collect::<Vec<_>>()
        };
        assert_eq!(wanted("G1"), ["G1"]);
        assert_eq!(wanted("G14"), ["G14 bulk", "G14 unary"]);
        assert_eq!(wanted("G14 bulk"), ["G14 bulk"]);
        assert_eq!(wanted("G1 "), ["G1"]);
        assert_eq!(wanted("lost spans"), ["lost spans"]);
        assert!(Goals::of(&[], known).expect("all of them").wants(known));
        for only in ["G", "G2", "", "G14 bul"] {
            let only = [only.to_owned()];
            let refused = Goals::of(&only, known).expect_err("it is none of them");
            let told = matches!(&refused, Failure::Said(Exit::Usage, text) if text.contains("there are G1, G11, G14 bulk"));
            assert!(told, "{refused:?}");
        }
    }

    #[test]
    fn figures_have_four_digits() {
        assert_eq!(rounded(123_456.0), 123_500.0);
        assert_eq!(rounded(0.012_345), 0.012_35);
        assert_eq!(rounded(0.0), 0.0);
    }
}
