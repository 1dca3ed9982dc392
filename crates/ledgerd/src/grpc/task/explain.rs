//! Why a task is not running.

use crate::grpc::access::Access;
use crate::grpc::convert;
use crate::grpc::wire;
use crate::ledger::Handle;
use crate::ledger::command::LedgerError;
use ledger_core::explain::{Explanation, Gate};

pub(super) async fn explain(
    handle: &Handle,
    access: &Access,
    said: wire::ExplainTaskRequest,
) -> Result<wire::ExplainTaskResponse, LedgerError> {
    let id = convert::task_id(&said.task_id)?;
    access.task(handle, id).await?;
    let Explanation { state, reason, summary, gates } = handle.explain(id).await?;
    Ok(wire::ExplainTaskResponse {
        task_id: id.to_string(),
        state: convert::state(state),
        reason: reason.as_str().to_owned(),
        summary,
        gates: gates.into_iter().map(gate).collect(),
    })
}

fn gate(gate: Gate) -> wire::Gate {
    let Gate { kind, detail, until, current, limit } = gate;
    wire::Gate { kind: kind as i32, detail, until: until.and_then(convert::time), current, limit }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger_core::explain::GateKind::{
        Behind, Blocked, Breaker, Budget, Draining, NoRoom, NoWorker, NotDue, Paused, Ramp, TypeNotServed,
    };

    #[test]
    fn gates_have_the_numbers_of_the_wire() {
        for (kind, name) in [
            (Blocked, "BLOCKED"),
            (NotDue, "NOT_DUE"),
            (Budget, "BUDGET"),
            (Paused, "PAUSED"),
            (Breaker, "BREAKER"),
            (Ramp, "RAMP"),
            (NoWorker, "NO_WORKER"),
            (TypeNotServed, "TYPE_NOT_SERVED"),
            (NoRoom, "NO_ROOM"),
            (Behind, "BEHIND"),
            (Draining, "DRAINING"),
        ] {
            let wire = wire::GateKind::try_from(kind as i32).expect("the wire has it");
            assert_eq!(wire.as_str_name(), format!("GATE_KIND_{name}"));
        }
    }
}
