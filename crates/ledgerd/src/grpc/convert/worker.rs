//! What workers say and are told.

use super::check::{At, Check};
use super::digest::Digest;
use super::task::{Names, class, error_out, new_task, span, state, stop_cause, time};
use crate::grpc::status::{self, Refused};
use crate::grpc::wire::{self, outcome, work_request};
use crate::ledger::command::{
    Assignment, FromWorker, HeldTask, LeaseVerdict, LedgerError, NewTask, Receipt, Settlement, Verdict,
};
use ledger_core::limits::{
    CAPACITY, CHECKPOINT_BYTES, ERROR_CODE_BYTES, ERROR_DETAIL_BYTES, ERROR_MESSAGE_BYTES, FOLLOW_UPS, ITEMS,
    NOTE_BYTES, QUESTION_BYTES, RESULT_BYTES, RUN_AT_AHEAD, TASK_TYPE_BYTES, WORKER_AGENTS, WORKER_ID_BYTES,
    WORKER_TYPES,
};
use ledger_core::session::Hello;
use ledger_core::{Outcome, ReleaseCause, TaskError, TaskId, Timestamp};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// The only version of the protocol so far.
const PROTOCOL: u32 = 1;

/// A Hello with everything about it checked.
pub(in crate::grpc) fn hello(said: wire::Hello) -> Result<Hello, Status> {
    if said.protocol_version != PROTOCOL {
        return Err(Refused::ProtocolVersion(said.protocol_version).into());
    }
    let mut check = Check::default();
    let at = At::In("hello");
    check.plain(at, "worker_id", &said.worker_id, 1..=WORKER_ID_BYTES);
    check.must(said.incarnation > 0, at, "incarnation", "set it to at least 1, higher with each start");
    check.must((1..=WORKER_AGENTS).contains(&said.agents.len()), at, "agents", "name 1 to 64 agents");
    check.must(said.task_types.len() <= WORKER_TYPES, at, "task_types", "name at most 256 task types");
    check.must(said.capacity <= CAPACITY, at, "capacity", "set it to 0 to 10,000");
    check.plain(at, "sdk", &said.sdk, 0..=NOTE_BYTES);
    let labels = check.labels(at, said.labels.into_iter());
    for (index, agent) in said.agents.iter().enumerate().take(WORKER_AGENTS) {
        check.agent(At::Item("hello.agents", index), "", agent);
    }
    for (index, name) in said.task_types.iter().enumerate().take(WORKER_TYPES) {
        check.plain(At::Item("hello.task_types", index), "", name, 1..=TASK_TYPE_BYTES);
    }
    let held = leases(&mut check, "hello.held", &said.held);
    let unreceipted = leases(&mut check, "hello.unreceipted", &said.unreceipted);
    let types: Vec<Arc<str>> = said.task_types.into_iter().map(Arc::from).collect();
    let hello = Hello {
        worker: said.worker_id.into(),
        incarnation: said.incarnation,
        agents: said.agents.into_iter().map(Arc::from).collect(),
        types: (!types.is_empty()).then(|| types.into()),
        capacity: said.capacity,
        labels,
        sdk: said.sdk,
        held,
        unreceipted,
    };
    check.done(hello).map_err(|error| status::status(&error))
}

fn leases(check: &mut Check, list: &'static str, leases: &[wire::Lease]) -> Vec<(TaskId, u64)> {
    if leases.len() > CAPACITY as usize {
        check.refuse(At::Root, list, "name at most 10,000 leases");
        return Vec::new();
    }
    let leases = leases.iter().enumerate();
    leases
        .map(|(index, lease)| (check.task(At::Item(list, index), "task_id", &lease.task_id), lease.fence))
        .collect()
}

/// Who settles outside of a stream.
pub(in crate::grpc) fn worker_id(check: &mut Check, name: String) -> Arc<str> {
    check.plain(At::Root, "worker_id", &name, 1..=WORKER_ID_BYTES);
    name.into()
}

/// A frame after Hello.
#[derive(Debug)]
pub(in crate::grpc) struct FromWire {
    /// What goes to the ledger; none when nothing is left of it.
    pub(in crate::grpc) frame: Option<FromWorker>,
    /// Items that cannot be right, and are answered without the ledger. The stream lives.
    pub(in crate::grpc) refused: Vec<wire::Receipt>,
}

/// A frame with everything about it checked.
///
/// # Errors
/// The status that the stream ends with: what is wrong is not one item, so nobody could be answered.
pub(in crate::grpc) fn from_worker(said: wire::WorkRequest, wall: Timestamp) -> Result<FromWire, Status> {
    use work_request::Frame;
    let mut refused = Vec::new();
    let mut check = Check::default();
    let frame = match said.frame {
        None => {
            check.refuse(At::Root, "frame", "fill in one of the frames");
            None
        }
        Some(Frame::Hello(_)) => return Err(Refused::HelloAgain.into()),
        Some(Frame::Capacity(said)) => {
            check.must(said.capacity <= CAPACITY, At::In("capacity"), "capacity", "set it to 0 to 10,000");
            Some(FromWorker::Capacity(said.capacity))
        }
        Some(Frame::Acks(said)) => {
            check.must(said.items.len() <= CAPACITY as usize, At::In("acks"), "items", "send at most 10,000");
            let mut acks = Vec::with_capacity(said.items.len());
            for (index, lease) in said.items.into_iter().enumerate() {
                let mut check = Check::default();
                let task = check.task(At::Item("acks.items", index), "task_id", &lease.task_id);
                match check.done((task, lease.fence)) {
                    Ok(ack) => acks.push(ack),
                    Err(error) => refused.push(refusal(Some(lease), wire::ReceiptKind::Ack, &error)),
                }
            }
            (!acks.is_empty()).then_some(FromWorker::Acks(acks))
        }
        Some(Frame::Heartbeat(said)) => {
            check.must(
                said.held.len() <= CAPACITY as usize,
                At::In("heartbeat"),
                "held",
                "name at most 10,000",
            );
            let held = said.held.into_iter().enumerate();
            let held =
                held.map(|(index, held)| beat(&mut check, At::Item("heartbeat.held", index), held)).collect();
            Some(FromWorker::Beat(held, said.sequence))
        }
        Some(Frame::Outcomes(said)) => {
            check.must(said.items.len() <= ITEMS, At::In("outcomes"), "items", "send at most 1,000");
            let mut items = Vec::with_capacity(said.items.len());
            for settled in settlements("outcomes.items", said.items, wall) {
                match settled {
                    Ok(settlement) => items.push(settlement),
                    Err(receipt) => refused.push(*receipt),
                }
            }
            (!items.is_empty()).then_some(FromWorker::Outcomes(items))
        }
        Some(Frame::Goodbye(_)) => Some(FromWorker::Goodbye),
    };
    check.done(FromWire { frame, refused }).map_err(|error| status::status(&error))
}

fn beat(check: &mut Check, at: At, held: wire::Held) -> HeldTask {
    let lease = held.lease.unwrap_or_default();
    check.must_fit(at, "checkpoint", held.checkpoint.as_ref().map_or(0, bytes::Bytes::len), CHECKPOINT_BYTES);
    let progress = held.progress.map(|progress| {
        let good = (0.0..=1.0).contains(&progress.fraction);
        check.must(good, at, "progress.fraction", "set it to 0 to 1");
        (progress.fraction, check.free(at, "progress.note", progress.note, NOTE_BYTES))
    });
    HeldTask {
        task: check.task(at, "lease.task_id", &lease.task_id),
        fence: lease.fence,
        progress,
        checkpoint: held.checkpoint,
    }
}

/// Outcomes one by one, in order: those that cannot be right come with their refusals.
pub(in crate::grpc) fn settlements(
    list: &'static str,
    outcomes: Vec<wire::Outcome>,
    wall: Timestamp,
) -> impl Iterator<Item = Result<Settlement, Box<wire::Receipt>>> {
    outcomes.into_iter().enumerate().map(move |(index, said)| {
        let lease = said.lease.clone();
        settlement(At::Item(list, index), said, wall)
            .map_err(|error| Box::new(refusal(lease, wire::ReceiptKind::Outcome, &error)))
    })
}

fn settlement(at: At, said: wire::Outcome, wall: Timestamp) -> Result<Settlement, LedgerError> {
    // Over the whole of it, so that a repetition is known by its digest alone.
    let digest = Digest::of("outcome").part(&said.encode_to_vec()).finish();
    let mut check = Check::default();
    let lease = said.lease.unwrap_or_default();
    let task = check.task(at, "lease.task_id", &lease.task_id);
    let (mut result, mut checkpoint, mut follow_ups) = (None, None, Vec::new());
    let outcome = match said.outcome {
        None => {
            check.refuse(at, "outcome", "say how the task ended");
            Outcome::Cancelled
        }
        Some(outcome::Outcome::Complete(complete)) => {
            check.must_fit(at, "complete.result", complete.result.len(), RESULT_BYTES);
            result = Some(complete.result);
            let few = complete.follow_ups.len() <= FOLLOW_UPS;
            check.must(few, at, "complete.follow_ups", "send at most 100");
            let new = complete.follow_ups.into_iter().take(FOLLOW_UPS).enumerate();
            follow_ups =
                new.map(|(index, new)| follow_up(&mut check, at, (index, new), task, wall)).collect();
            Outcome::Complete
        }
        Some(outcome::Outcome::Fail(fail)) => {
            let error = fail.error.unwrap_or_default();
            Outcome::Fail {
                error: Arc::new(TaskError {
                    class: class(&mut check, at, "fail.error.class", error.class),
                    code: check.free(at, "fail.error.code", error.code, ERROR_CODE_BYTES),
                    message: check.free(at, "fail.error.message", error.message, ERROR_MESSAGE_BYTES),
                    detail: check.free(at, "fail.error.detail", error.detail, ERROR_DETAIL_BYTES),
                }),
                retry_after: check.span(at, "fail.retry_after", fail.retry_after),
            }
        }
        Some(outcome::Outcome::Release(release)) => {
            let delay = check.span(at, "release.delay", release.delay).unwrap_or(Duration::ZERO);
            check.must(delay <= RUN_AT_AHEAD, at, "release.delay", "set it to at most 366 days");
            check_checkpoint(&mut check, at, "release.checkpoint", release.checkpoint.as_ref());
            checkpoint = release.checkpoint;
            let cause = match check.word::<wire::ReleaseCause>(at, "release.cause", release.cause) {
                Some(wire::ReleaseCause::Drain) => ReleaseCause::Drain,
                Some(wire::ReleaseCause::Preempted) => ReleaseCause::Preempted,
                Some(wire::ReleaseCause::Declined | wire::ReleaseCause::Unspecified) | None => {
                    ReleaseCause::Declined
                }
            };
            Outcome::Release { cause, delay }
        }
        Some(outcome::Outcome::Block(block)) => {
            check.must(!block.question.is_empty(), at, "block.question", "say what the task waits for");
            check_checkpoint(&mut check, at, "block.checkpoint", block.checkpoint.as_ref());
            checkpoint = block.checkpoint;
            // That `until` lies ahead is for the ledger to say, which knows a repetition when it sees one.
            Outcome::Block {
                question: check.free(at, "block.question", block.question, QUESTION_BYTES).into(),
                until: check.time(at, "block.until", block.until),
            }
        }
        Some(outcome::Outcome::Cancelled(wire::Cancelled {})) => Outcome::Cancelled,
    };
    check.done(Settlement { task, fence: lease.fence, outcome, result, checkpoint, follow_ups, digest })
}

/// A task to be enqueued with a completion; what is wrong with it is named with its place in the outcome.
fn follow_up(
    check: &mut Check,
    at: At,
    (index, new): (usize, wire::NewTask),
    parent: TaskId,
    wall: Timestamp,
) -> NewTask {
    let mut own = Check::default();
    let mut task =
        new_task(&mut own, At::Item("complete.follow_ups", index), new, wall, &mut Names::default());
    for violation in own.found().drain(..) {
        check.refuse(at, &violation.field, violation.rule);
    }
    if let Some(data) = Arc::get_mut(&mut task.data) {
        data.parent = Some(parent);
    }
    task
}

fn check_checkpoint(check: &mut Check, at: At, field: &str, checkpoint: Option<&bytes::Bytes>) {
    check.must_fit(at, field, checkpoint.map_or(0, bytes::Bytes::len), CHECKPOINT_BYTES);
}

fn refusal(lease: Option<wire::Lease>, kind: wire::ReceiptKind, error: &LedgerError) -> wire::Receipt {
    wire::Receipt { lease, kind: kind as i32, error: Some(status::item(error)), ..wire::Receipt::default() }
}

/// The durable answer to an ack or outcome.
pub(in crate::grpc) fn receipt(receipt: &Receipt) -> wire::Receipt {
    let kind = if receipt.is_ack { wire::ReceiptKind::Ack } else { wire::ReceiptKind::Outcome };
    match &receipt.result {
        Err(error) => refusal(Some(lease(receipt.task, receipt.fence)), kind, error),
        Ok(recorded) => wire::Receipt {
            lease: Some(lease(receipt.task, receipt.fence)),
            kind: kind as i32,
            state: state(recorded.state),
            reason: recorded.reason.as_str().to_owned(),
            version: recorded.version,
            run_at: recorded.run_at.and_then(time),
            error: None,
            follow_up_ids: recorded.follow_ups.iter().map(TaskId::to_string).collect(),
        },
    }
}

/// How a lease stands.
pub(in crate::grpc) fn verdict(verdict: &LeaseVerdict) -> wire::LeaseVerdict {
    let (state, stop) = match verdict.verdict {
        Verdict::Extended => (wire::LeaseState::Extended, None),
        Verdict::Stop(stop, left) => (wire::LeaseState::Stop, Some((stop, left))),
        Verdict::Lost => (wire::LeaseState::Lost, None),
    };
    wire::LeaseVerdict {
        lease: Some(lease(verdict.task, verdict.fence)),
        state: state as i32,
        stop_cause: stop.map_or(0, |(stop, _)| stop_cause(stop.cause)),
        stop_grace: stop.map(|(_, left)| span(left)),
    }
}

/// A task handed out.
pub(in crate::grpc) fn assignment(assignment: Assignment) -> wire::Assignment {
    let data = assignment.data;
    wire::Assignment {
        task_id: assignment.task.to_string(),
        fence: assignment.fence,
        agent: assignment.agent.as_ref().to_owned(),
        task_type: assignment.task_type.as_ref().to_owned(),
        payload: data.payload.clone(),
        delivery: assignment.delivery,
        attempt: assignment.attempt,
        ack_timeout: Some(span(assignment.ack_timeout)),
        time_left: assignment.time_left.map(span),
        lease_duration: Some(span(assignment.lease_duration)),
        checkpoint: assignment.checkpoint,
        last_error: assignment.last_error.as_deref().map(error_out),
        traceparent: data.traceparent.clone(),
        tracestate: data.tracestate.clone(),
        labels: data.labels.iter().cloned().collect(),
        priority: i32::from(assignment.priority),
        question: assignment.question.map(|text| text.as_ref().to_owned()).unwrap_or_default(),
        answer: assignment.answer.map(|text| text.as_ref().to_owned()).unwrap_or_default(),
    }
}

fn lease(task: TaskId, fence: u64) -> wire::Lease {
    wire::Lease { task_id: task.to_string(), fence }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;
    use tonic_types::StatusExt;
    use wire::work_request::Frame;

    fn good() -> wire::Hello {
        wire::Hello {
            worker_id: "w".into(),
            incarnation: 1,
            agents: vec!["claude".into()],
            protocol_version: 1,
            ..wire::Hello::default()
        }
    }

    fn fault(said: wire::Hello) -> (Code, String) {
        let status = hello(said).expect_err("a fault");
        let field = status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
        (status.code(), field.unwrap_or_default())
    }

    #[test]
    fn bad_hellos_are_refused() {
        assert!(hello(good()).is_ok());
        let table = [
            (wire::Hello { worker_id: String::new(), ..good() }, "hello.worker_id"),
            (wire::Hello { worker_id: "a\0".into(), ..good() }, "hello.worker_id"),
            (wire::Hello { worker_id: "w".repeat(129), ..good() }, "hello.worker_id"),
            (wire::Hello { incarnation: 0, ..good() }, "hello.incarnation"),
            (wire::Hello { agents: Vec::new(), ..good() }, "hello.agents"),
            (wire::Hello { agents: vec!["a".into(), "..".into()], ..good() }, "hello.agents[1]"),
            (wire::Hello { task_types: vec!["a\nb".into()], ..good() }, "hello.task_types[0]"),
            (wire::Hello { capacity: 10_001, ..good() }, "hello.capacity"),
            (wire::Hello { capacity: 1 << 31, ..good() }, "hello.capacity"),
            (
                wire::Hello { held: vec![wire::Lease { task_id: "x".into(), fence: 1 }], ..good() },
                "hello.held[0].task_id",
            ),
        ];
        for (said, field) in table {
            assert_eq!(fault(said), (Code::InvalidArgument, field.to_owned()));
        }
        assert_eq!(fault(wire::Hello { protocol_version: 2, ..good() }).0, Code::FailedPrecondition);
    }

    #[test]
    fn frames_that_nobody_could_answer_end_the_stream() {
        let end =
            |frame| from_worker(wire::WorkRequest { frame }, Timestamp::EPOCH).expect_err("an end").code();
        assert_eq!(end(None), Code::InvalidArgument);
        assert_eq!(end(Some(Frame::Hello(good()))), Code::FailedPrecondition);
        assert_eq!(end(Some(Frame::Capacity(wire::Capacity { capacity: 10_001 }))), Code::InvalidArgument);
        let outcomes = wire::Outcomes { items: vec![wire::Outcome::default(); 1_001] };
        assert_eq!(end(Some(Frame::Outcomes(outcomes))), Code::InvalidArgument);
        let progress = wire::Progress { fraction: f64::NAN, ..wire::Progress::default() };
        let lease = Some(wire::Lease { task_id: "t1".into(), fence: 1 });
        let held = vec![wire::Held { lease, progress: Some(progress), checkpoint: None }];
        assert_eq!(end(Some(Frame::Heartbeat(wire::Heartbeat { held, sequence: 1 }))), Code::InvalidArgument);
    }

    #[test]
    fn one_bad_item_is_refused_and_its_neighbours_go_on() {
        let lease = |id: &str| Some(wire::Lease { task_id: id.into(), fence: 1 });
        let complete = |len| {
            let result = vec![0u8; len].into();
            Some(outcome::Outcome::Complete(wire::Complete { result, follow_ups: Vec::new() }))
        };
        let fail = |error| Some(outcome::Outcome::Fail(wire::Fail { error: Some(error), retry_after: None }));
        let items = vec![
            wire::Outcome { lease: lease("t1"), outcome: complete(1) },
            wire::Outcome { lease: lease("t2"), outcome: None },
            wire::Outcome { lease: lease("nope"), outcome: complete(1) },
            wire::Outcome { lease: lease("t3"), outcome: complete(RESULT_BYTES + 1) },
            wire::Outcome {
                lease: lease("t4"),
                outcome: fail(wire::TaskError { class: 7, ..wire::TaskError::default() }),
            },
            wire::Outcome {
                lease: lease("t5"),
                outcome: fail(wire::TaskError { message: "m".repeat(4_097), ..wire::TaskError::default() }),
            },
            wire::Outcome {
                lease: lease("t6"),
                outcome: fail(wire::TaskError { detail: "end\0".into(), ..wire::TaskError::default() }),
            },
        ];
        let read = from_worker(
            wire::WorkRequest { frame: Some(Frame::Outcomes(wire::Outcomes { items })) },
            Timestamp::EPOCH,
        );
        let FromWire { frame: Some(FromWorker::Outcomes(good)), refused } = read.expect("a frame") else {
            panic!("outcomes");
        };
        assert_eq!(good.iter().map(|item| item.task).collect::<Vec<_>>(), [TaskId(1), TaskId(6)]);
        let fields: Vec<_> =
            refused.iter().map(|r| r.error.as_ref().expect("an error").field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "outcomes.items[1].outcome",
                "outcomes.items[2].lease.task_id",
                "outcomes.items[3].complete.result",
                "outcomes.items[4].fail.error.class",
                "outcomes.items[5].fail.error.message",
            ]
        );
        assert_eq!(refused[1].lease, lease("nope"), "told by the name it was sent with");
    }

    #[test]
    fn a_repeated_outcome_has_the_same_digest_and_another_one_another() {
        let settle = |result: &'static [u8], fence| {
            let lease = Some(wire::Lease { task_id: "t1".into(), fence });
            let complete = wire::Complete { result: result.into(), follow_ups: Vec::new() };
            let said = wire::Outcome { lease, outcome: Some(outcome::Outcome::Complete(complete)) };
            settlement(At::Root, said, Timestamp::EPOCH).expect("an outcome").digest
        };
        assert_eq!(settle(b"a", 1), settle(b"a", 1));
        assert_ne!(settle(b"a", 1), settle(b"b", 1));
    }
}
