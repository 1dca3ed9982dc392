//! What is wrong with a configuration: every finding, not the first one.
//!
//! Not for failures of calls; those belong to the caller. Invariant: a [`ConfigErrors`] is never empty.

use std::fmt;

/// One field that cannot be used as given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The name of the field.
    pub field: &'static str,
    /// What it held.
    pub value: String,
    /// What it has to be.
    pub rule: &'static str,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, must be {}", self.field, self.value, self.rule)
    }
}

impl std::error::Error for ConfigError {}

/// All findings of one validation, in the order of the fields. Whoever edits a configuration wants to edit it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The findings; at least one.
    #[must_use]
    pub fn errors(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl IntoIterator for ConfigErrors {
    type Item = ConfigError;
    type IntoIter = std::vec::IntoIter<ConfigError>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Collects findings while a configuration is checked.
#[derive(Default)]
pub(crate) struct Findings(Vec<ConfigError>);

impl Findings {
    pub(crate) fn require(
        &mut self,
        holds: bool,
        field: &'static str,
        value: &dyn fmt::Debug,
        rule: &'static str,
    ) {
        if !holds {
            self.0.push(ConfigError { field, value: format!("{value:?}"), rule });
        }
    }

    pub(crate) fn finish(self) -> Result<(), ConfigErrors> {
        if self.0.is_empty() { Ok(()) } else { Err(ConfigErrors(self.0)) }
    }
}
