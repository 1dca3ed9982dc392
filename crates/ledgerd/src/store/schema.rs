//! How the schema of a store stands beside the migrations that this program knows.
//!
//! Only compares. What was applied is read, and what is pending applied, by each store.

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migration, MigrationType};
use std::borrow::Cow;

/// What was applied, for either store: version, name, SHA-384 of its text, and whether it was done to its end.
pub(super) const APPLIED: &str =
    "SELECT version, description, checksum, success FROM _sqlx_migrations ORDER BY version";

/// One migration, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number, from 1.
    pub version: i64,
    /// What it is called.
    pub name: String,
    /// Where it stands.
    pub state: StepState,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepState {
    /// It was applied, as this program has it.
    Applied,
    /// It is still to be applied.
    Pending,
    /// It was applied, and not as this program has it, or not to its end.
    Altered,
    /// It was applied by a later ledgerd.
    Unknown,
}

impl StepState {
    /// Its name, in capitals.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "APPLIED",
            Self::Pending => "PENDING",
            Self::Altered => "ALTERED",
            Self::Unknown => "UNKNOWN",
        }
    }
}

/// Where a schema stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Every migration is applied.
    UpToDate,
    /// Some are pending.
    Behind,
    /// There is no ledger yet.
    Missing,
    /// A later ledgerd made it.
    Newer,
    /// It is not as any release made it.
    Altered,
}

impl Standing {
    /// Of these steps. What is worst counts.
    #[must_use]
    pub fn of(steps: &[Step]) -> Self {
        let any = |state| steps.iter().any(|step| step.state == state);
        if any(StepState::Altered) {
            Self::Altered
        } else if any(StepState::Unknown) {
            Self::Newer
        } else if !any(StepState::Pending) {
            Self::UpToDate
        } else if any(StepState::Applied) {
            Self::Behind
        } else {
            Self::Missing
        }
    }

    /// Its name, in capitals.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UpToDate => "UP_TO_DATE",
            Self::Behind => "BEHIND",
            Self::Missing => "MISSING",
            Self::Newer => "NEWER",
            Self::Altered => "ALTERED",
        }
    }
}

/// A row of [`APPLIED`].
pub(super) struct Applied {
    pub(super) version: i64,
    pub(super) name: String,
    pub(super) checksum: Vec<u8>,
    pub(super) done: bool,
}

/// A store's migrations, from number, name and text.
pub(super) fn migrations(known: &[(i64, &'static str, &'static str)]) -> Vec<Migration> {
    let migration = |(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(*version, Cow::Borrowed(*name), MigrationType::Simple, sql.into_sql_str(), false)
    };
    known.iter().map(migration).collect()
}

/// Every migration that is known or was applied, by number.
pub(super) fn compare(known: &[Migration], applied: &[Applied]) -> Vec<Step> {
    let known = known.iter().map(|migration| {
        let found = applied.iter().find(|applied| applied.version == migration.version);
        let state = match found {
            None => StepState::Pending,
            Some(found) if found.done && found.checksum == *migration.checksum => StepState::Applied,
            Some(_) => StepState::Altered,
        };
        Step { version: migration.version, name: migration.description.to_string(), state }
    });
    let mut steps: Vec<Step> = known.collect();
    let is_new = |applied: &&Applied| steps.iter().all(|step| step.version != applied.version);
    let unknown = applied.iter().filter(is_new).map(|applied| Step {
        version: applied.version,
        name: applied.name.clone(),
        state: StepState::Unknown,
    });
    let unknown: Vec<Step> = unknown.collect();
    steps.extend(unknown);
    steps.sort_by_key(|step| step.version);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worst_of_a_schema_counts() {
        let known = migrations(&[(1, "one", "SELECT 1"), (2, "two", "SELECT 2")]);
        let applied = |version: i64, sql: &str, done| Applied {
            version,
            name: "x".to_owned(),
            checksum: sqlx::migrate::Migration::new(
                version,
                Cow::Borrowed("x"),
                MigrationType::Simple,
                sqlx::AssertSqlSafe(sql.to_owned()).into_sql_str(),
                false,
            )
            .checksum
            .into_owned(),
            done,
        };
        let standing = |rows: &[Applied]| Standing::of(&compare(&known, rows));
        let (one, two) = (|| applied(1, "SELECT 1", true), || applied(2, "SELECT 2", true));
        assert_eq!(standing(&[]), Standing::Missing);
        assert_eq!(standing(&[one()]), Standing::Behind);
        assert_eq!(standing(&[one(), two()]), Standing::UpToDate);
        assert_eq!(standing(&[one(), two(), applied(3, "SELECT 3", true)]), Standing::Newer);
        assert_eq!(standing(&[one(), applied(2, "SELECT 9", true)]), Standing::Altered);
        assert_eq!(standing(&[one(), applied(2, "SELECT 2", false)]), Standing::Altered);
        let steps = compare(&known, &[one(), applied(3, "SELECT 3", true)]);
        let states: Vec<_> = steps.iter().map(|step| (step.version, step.state.as_str())).collect();
        assert_eq!(states, [(1, "APPLIED"), (2, "PENDING"), (3, "UNKNOWN")]);
    }
}
