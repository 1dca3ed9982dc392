//! Room: how much a worker may be sent.

use ledger_core::session::{Session, Unsent};
use ledger_core::{AgentId, SessionId, TaskId, Timestamp, limits};

pub(crate) fn session(id: u64, worker: &str, agents: &[u32], capacity: u32) -> Session {
    Session {
        id: SessionId(id),
        worker: worker.into(),
        incarnation: 1,
        agents: agents.iter().copied().map(AgentId).collect(),
        types: None,
        capacity,
        labels: Vec::new(),
        sdk: String::new(),
        connected_at: Timestamp::EPOCH,
        beat_at: Timestamp::EPOCH,
        held: ledger_core::TaskSet::default(),
        unacked_run: 0,
        cursor: 0,
        unsent: Unsent::default(),
    }
}

#[test]
fn room_is_capacity_less_all_that_is_held() {
    let mut session = session(1, "w", &[1], 3);
    assert_eq!(session.room(), 3);
    // Lost tasks stay in `held` until a beat omits them, and so take room.
    session.held.extend([TaskId(1), TaskId(2)]);
    assert_eq!(session.room(), 1);
}

#[test]
fn capacity_zero_means_send_me_nothing() {
    assert_eq!(session(1, "w", &[1], 0).room(), 0);
}

#[test]
fn a_capacity_lowered_below_what_is_held_leaves_no_room() {
    let mut session = session(1, "w", &[1], 3);
    session.held.extend([TaskId(1), TaskId(2), TaskId(3)]);
    session.capacity = 1;
    assert_eq!(session.room(), 0);
}

#[test]
fn a_session_with_too_much_unsent_has_no_room_until_it_is_sent() {
    let session = session(1, "w", &[1], 3);
    session.unsent.add(limits::UNSENT_BYTES);
    assert_eq!(session.room(), 3, "the limit itself is allowed");
    session.unsent.add(1);
    assert_eq!(session.room(), 0);
    session.unsent.sent(1);
    assert_eq!(session.room(), 3);
    session.unsent.sent(usize::MAX);
    assert_eq!(session.unsent.bytes(), 0, "more sent than waited is nothing left");
}

#[test]
fn three_ack_timeouts_in_a_row_leave_no_room() {
    let mut session = session(1, "w", &[1], 3);
    session.unacked_run = 2;
    assert_eq!(session.room(), 3);
    session.unacked_run = 3;
    assert_eq!(session.room(), 0);
    session.unacked_run = 0;
    assert_eq!(session.room(), 3);
}

#[test]
fn a_session_takes_the_types_it_named_or_all() {
    let mut session = session(1, "w", &[1], 1);
    assert!(session.takes("anything"));
    session.types = Some(["resize".into(), "crop".into()].into());
    assert!(session.takes("crop") && !session.takes("anything"));
}
