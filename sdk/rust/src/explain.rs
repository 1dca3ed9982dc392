//! Why a task is not running.

use std::time::SystemTime;

use crate::v1;

/// Why a task is where it is. Returned by [`crate::TaskHandle::explain`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Explanation {
    /// Where it is.
    pub state: v1::TaskState,
    /// Finer meaning of that, for instance `BACKOFF`; may be empty.
    pub reason: String,
    /// One sentence: it runs, it has ended, what it waits for, or that nothing stands in its way.
    pub summary: String,
    /// What keeps it from running, in the order in which gates are passed; empty when it runs, has ended, or is handed
    /// out next.
    pub gates: Vec<Gate>,
}

/// One thing that keeps a task from running.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gate {
    /// Which; unspecified for one that a newer daemon has and this crate does not know.
    pub kind: v1::GateKind,
    /// One sentence with the numbers.
    pub detail: String,
    /// When it opens by itself, where that is known.
    pub until: Option<SystemTime>,
    /// The number that counts (tokens there, tasks running, tasks ahead); 0 where there is none.
    pub current: f64,
    /// What it is measured against (tokens needed, room in all); 0 where there is none.
    pub limit: f64,
}

impl From<v1::ExplainTaskResponse> for Explanation {
    fn from(said: v1::ExplainTaskResponse) -> Self {
        Self {
            state: said.state(),
            reason: said.reason,
            summary: said.summary,
            gates: said.gates.into_iter().map(Gate::from).collect(),
        }
    }
}

impl From<v1::Gate> for Gate {
    fn from(said: v1::Gate) -> Self {
        Self {
            kind: said.kind(),
            detail: said.detail,
            until: said.until.and_then(|at| SystemTime::try_from(at).ok()),
            current: said.current,
            limit: said.limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_the_wire_says_is_told_and_what_is_unknown_is_unspecified() {
        let gate = |kind| v1::Gate {
            kind,
            detail: "It waits.".into(),
            until: Some(prost_types::Timestamp { seconds: 7, nanos: 0 }),
            current: 0.5,
            limit: 2.0,
        };
        let said = v1::ExplainTaskResponse {
            task_id: "t1".into(),
            state: v1::TaskState::Retry.into(),
            reason: "BUDGET".into(),
            summary: "One sentence.".into(),
            gates: vec![gate(v1::GateKind::Budget.into()), gate(99)],
        };
        let told = Explanation::from(said);
        assert_eq!((told.state, &*told.reason), (v1::TaskState::Retry, "BUDGET"));
        assert_eq!(told.summary, "One sentence.");
        let kinds: Vec<_> = told.gates.iter().map(|gate| gate.kind).collect();
        assert_eq!(kinds, [v1::GateKind::Budget, v1::GateKind::Unspecified]);
        let gate = &told.gates[0];
        assert_eq!((&*gate.detail, gate.current, gate.limit), ("It waits.", 0.5, 2.0));
        assert_eq!(gate.until, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)));
    }
}
