//! One circuit per key, made when first asked for.
//!
//! Not a cache: nothing leaves by itself, so keys must come from a bounded set, or be removed.
//!
//! Invariant: one key, one circuit, so the trouble of one key opens no other.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::broken::ConfigErrors;
use crate::circuit::{Circuit, Rim};
use crate::config::Config;
use crate::shared::Shared;
use crate::words::{Availability, State, Stats, Transition};

/// Circuits by key, all with the same settings and clock.
///
/// ```
/// use breaker_core::{Config, Registry};
///
/// let registry = Registry::new(Config::default())?;
/// let mail = registry.get("mail");
/// assert!(std::sync::Arc::ptr_eq(&mail, &registry.get("mail")));
/// assert_eq!(registry.report().len(), 1);
/// # Ok::<(), breaker_core::ConfigErrors>(())
/// ```
#[derive(Debug)]
pub struct Registry {
    config: Config,
    rim: Rim,
    circuits: RwLock<BTreeMap<String, Arc<Circuit>>>,
}

/// One circuit, as [`Registry::report`] found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its key.
    pub key: String,
    /// Its state.
    pub state: State,
    /// The number of its transitions.
    pub epoch: u64,
    /// Whether a call would go through.
    pub availability: Availability,
    /// What it has seen.
    pub stats: Stats,
}

impl Registry {
    /// An empty one, with the machine's clock.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn new(config: Config) -> Result<Self, ConfigErrors> {
        Self::with_rim(config, Rim::system())
    }

    /// An empty one, with a clock of the caller's own.
    ///
    /// # Errors
    ///
    /// Every rule that `config` breaks.
    pub fn with_rim(config: Config, rim: Rim) -> Result<Self, ConfigErrors> {
        config.validate()?;
        Ok(Self { config, rim, circuits: RwLock::default() })
    }

    /// The circuit of `key`: the same one each time, made the first time.
    pub fn get(&self, key: &str) -> Arc<Circuit> {
        // No code of a user runs under this lock, so a poisoned one guards nothing broken.
        let circuits = self.circuits.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(circuit) = circuits.get(key) {
            return Arc::clone(circuit);
        }
        drop(circuits);
        let mut circuits = self.circuits.write().unwrap_or_else(PoisonError::into_inner);
        // Asked again under the writing lock: of two who come first, the second finds the first's.
        let circuit = circuits.entry(key.to_owned()).or_insert_with(|| {
            let shared =
                Shared::new(self.config).expect("the settings were validated when the registry was made");
            Arc::new(Circuit::with_rim(shared, self.rim.clone()))
        });
        Arc::clone(circuit)
    }

    /// Forgets the circuit of `key`. Whoever holds it goes on with it; the next to ask gets a new one.
    pub fn remove(&self, key: &str) -> Option<Arc<Circuit>> {
        self.circuits.write().unwrap_or_else(PoisonError::into_inner).remove(key)
    }

    /// Resets every circuit, and tells each key's transition.
    pub fn reset_all(&self) -> Vec<(String, Transition)> {
        self.all().into_iter().map(|(key, circuit)| (key, circuit.reset())).collect()
    }

    /// Every circuit as it is now, by key.
    #[must_use]
    pub fn report(&self) -> Vec<Report> {
        self.all()
            .into_iter()
            .map(|(key, circuit)| {
                let now = circuit.now();
                let breaker = circuit.breaker().lock();
                Report {
                    key,
                    state: breaker.state(),
                    epoch: breaker.epoch(),
                    availability: breaker.is_available(now),
                    stats: breaker.stats(),
                }
            })
            .collect()
    }

    /// Copied out, so that nobody waits for the map while each breaker is visited.
    fn all(&self) -> Vec<(String, Arc<Circuit>)> {
        let circuits = self.circuits.read().unwrap_or_else(PoisonError::into_inner);
        circuits.iter().map(|(key, circuit)| (key.clone(), Arc::clone(circuit))).collect()
    }
}
