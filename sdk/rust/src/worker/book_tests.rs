use super::*;
use crate::words::wire_span;

const SECOND: Duration = Duration::from_secs(1);

fn lease(n: u64, fence: u64) -> v1::Lease {
    v1::Lease { task_id: format!("t{n}"), fence }
}

fn assignment(n: u64, fence: u64) -> v1::Assignment {
    v1::Assignment {
        task_id: format!("t{n}"),
        fence,
        ack_timeout: Some(wire_span(10 * SECOND)),
        lease_duration: Some(wire_span(60 * SECOND)),
        ..Default::default()
    }
}

fn welcome() -> v1::Welcome {
    v1::Welcome {
        heartbeat_interval: Some(wire_span(20 * SECOND)),
        ack_delay_max: Some(wire_span(SECOND)),
        ..Default::default()
    }
}

fn done() -> Outcome {
    Outcome::Complete(v1::Complete::default())
}

fn fail() -> Outcome {
    Outcome::Fail(v1::Fail::default())
}

fn lost() -> v1::ItemError {
    let code = tonic::Code::FailedPrecondition as i32;
    v1::ItemError { code, reason: "LEASE_LOST".into(), ..Default::default() }
}

fn verdict(lease: v1::Lease, state: v1::LeaseState) -> v1::LeaseVerdict {
    v1::LeaseVerdict { lease: Some(lease), state: state as i32, ..Default::default() }
}

/// A book with a stream open since `start`.
fn open() -> (Book, Instant) {
    let start = Instant::now();
    let mut book = Book::new(start);
    book.welcome(&welcome(), start);
    (book, start)
}

fn names(frames: &[Frame]) -> Vec<&'static str> {
    let name = |frame: &Frame| match frame {
        Frame::Hello(_) => "hello",
        Frame::Capacity(_) => "capacity",
        Frame::Acks(_) => "acks",
        Frame::Heartbeat(_) => "beat",
        Frame::Outcomes(_) => "outcomes",
        Frame::Goodbye(_) => "goodbye",
    };
    frames.iter().map(name).collect()
}

fn acks(frames: &[Frame]) -> usize {
    frames.iter().map(|frame| if let Frame::Acks(acks) = frame { acks.items.len() } else { 0 }).sum()
}

fn beat(frames: &[Frame]) -> &v1::Heartbeat {
    frames
        .iter()
        .find_map(|f| if let Frame::Heartbeat(beat) = f { Some(beat) } else { None })
        .expect("a beat")
}

#[test]
fn the_outcome_of_a_short_task_stands_for_its_ack() {
    let (mut book, start) = open();
    assert_eq!(book.assign(&assignment(1, 1), start), Taken::Start { replaces: None });
    assert!(book.flush(start).is_empty());
    assert!(book.finish(&lease(1, 1), done(), start + SECOND / 10));
    assert_eq!(names(&book.flush(start + SECOND / 10)), ["outcomes"]);
    assert!(book.flush(start + 2 * SECOND).is_empty());
}

#[test]
fn acks_go_together_within_half_of_what_is_allowed() {
    let (mut book, start) = open();
    for n in 0..100 {
        book.assign(&assignment(n, 1), start + Duration::from_millis(n));
    }
    let due = book.next_due();
    assert!(due <= start + SECOND / 2, "{:?}", due - start);
    assert_eq!(acks(&book.flush(due)), 100);
    assert_eq!(book.next_due(), due + RESEND);
}

#[test]
fn the_shortest_ack_timeout_bounds_the_hold() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    let hasty = v1::Assignment { ack_timeout: Some(wire_span(SECOND / 10)), ..assignment(2, 1) };
    book.assign(&hasty, start);
    assert!(book.next_due() <= start + SECOND / 100);
}

#[test]
fn an_ack_is_repeated_until_receipted() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    let first = start + SECOND / 2;
    assert_eq!(acks(&book.flush(first)), 1);
    assert_eq!(acks(&book.flush(first + RESEND)), 1);
    assert_eq!(book.ack_receipt(&lease(1, 1), None), Ruling::Goes);
    assert_eq!(acks(&book.flush(first + 2 * RESEND)), 0);
}

#[test]
fn a_refused_ack_ends_the_task_without_an_outcome() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    let unclear = v1::ItemError { code: tonic::Code::Unknown as i32, ..Default::default() };
    assert_eq!(book.ack_receipt(&lease(1, 1), Some(&unclear)), Ruling::Goes);
    assert_eq!(book.ack_receipt(&lease(1, 2), Some(&lost())), Ruling::Goes, "of another fence");
    assert_eq!(book.ack_receipt(&lease(1, 1), Some(&lost())), Ruling::Lost);
    assert!(!book.finish(&lease(1, 1), done(), start));
    assert!(book.all_receipted() && book.flush(start + RESEND).is_empty());
}

#[test]
fn a_repeated_assignment_does_not_run_again() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 3), start);
    assert_eq!(book.assign(&assignment(1, 3), start), Taken::Repeat, "held");
    assert_eq!(book.assign(&assignment(1, 2), start), Taken::Repeat, "older");
    book.finish(&lease(1, 3), done(), start);
    assert_eq!(book.assign(&assignment(1, 3), start), Taken::Repeat, "in the outbox");
    assert_eq!(book.outcome_receipt(&lease(1, 3), None), Settled::Over(None));
    assert_eq!(book.assign(&assignment(1, 3), start), Taken::Repeat, "settled");
    assert_eq!(book.assign(&assignment(1, 4), start), Taken::Start { replaces: None }, "newer");
}

#[test]
fn a_newer_claim_replaces_the_older_one() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    assert_eq!(book.assign(&assignment(1, 2), start), Taken::Start { replaces: Some(lease(1, 1)) });
    assert!(!book.finish(&lease(1, 1), done(), start));
    assert!(book.holds(&lease(1, 2)));
    assert_eq!(book.statement().0, [lease(1, 2)]);
}

#[test]
fn verdicts_rule_held_leases_only() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    book.assign(&assignment(2, 1), start);
    assert_eq!(book.verdict(&verdict(lease(1, 1), v1::LeaseState::Extended)), Ruling::Goes);
    let stop = v1::LeaseVerdict {
        stop_cause: v1::StopCause::Deadline as i32,
        stop_grace: Some(wire_span(30 * SECOND)),
        ..verdict(lease(1, 1), v1::LeaseState::Stop)
    };
    assert_eq!(book.verdict(&stop), Ruling::Stop { cause: v1::StopCause::Deadline, grace: 30 * SECOND });
    book.finish(&lease(1, 1), done(), start);
    assert_eq!(
        book.verdict(&verdict(lease(1, 1), v1::LeaseState::Lost)),
        Ruling::Goes,
        "only a receipt ends it"
    );
    assert!(!book.all_receipted());
    assert_eq!(book.verdict(&verdict(lease(2, 1), v1::LeaseState::Lost)), Ruling::Lost);
    assert!(!book.holds(&lease(2, 1)));
}

#[test]
fn beats_state_everything_held_and_come_often_enough_for_the_shortest_lease() {
    let (mut book, start) = open();
    assert_eq!(names(&book.flush(start + 20 * SECOND)), ["beat"], "an empty beat too");
    let now = start + 21 * SECOND;
    for n in 0..3 {
        book.assign(&assignment(n, 1), now);
    }
    let short = v1::Assignment { lease_duration: Some(wire_span(6 * SECOND)), ..assignment(3, 1) };
    book.assign(&short, now);
    let at = start + 22 * SECOND;
    assert_eq!(beat(&book.flush(at)).held.len(), 4);
    let frames = book.flush(at + 2 * SECOND);
    assert_eq!(beat(&frames).held.len(), 4);
    book.finish(&lease(3, 1), done(), at + 3 * SECOND);
    assert_eq!(beat(&book.flush(at + 4 * SECOND)).held.len(), 3);
}

#[test]
fn news_ride_on_a_beat_within_a_second_and_only_while_unanswered() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    let progress = v1::Progress { fraction: 0.5, ..Default::default() };
    book.news(&lease(1, 1), Some(progress.clone()), Some(Bytes::from_static(b"c")));
    let frames = book.flush(start + SECOND);
    let said = beat(&frames);
    assert_eq!(said.held[0].progress, Some(progress));
    assert_eq!(said.held[0].checkpoint.as_deref(), Some(&b"c"[..]));
    let next = book.flush(start + 21 * SECOND);
    assert!(beat(&next).held[0].checkpoint.is_none(), "not yet doubted");
    let next = book.flush(start + 41 * SECOND);
    assert!(beat(&next).held[0].checkpoint.is_some(), "two beats without an answer");
    book.beat_answered(3);
    for round in 3..6 {
        let frames = book.flush(start + SECOND + 20 * SECOND * round);
        assert!(beat(&frames).held[0].checkpoint.is_none());
    }
}

#[test]
fn a_checkpoint_goes_before_the_failure_that_cannot_carry_it() {
    let (mut book, start) = open();
    book.assign(&assignment(1, 1), start);
    book.news(&lease(1, 1), None, Some(Bytes::from_static(b"c")));
    book.finish(&lease(1, 1), fail(), start);
    let frames = book.flush(start);
    assert_eq!(names(&frames), ["acks", "beat", "outcomes"]);
    assert_eq!(beat(&frames).held[0].checkpoint.as_deref(), Some(&b"c"[..]));

    book.assign(&assignment(2, 1), start);
    book.news(&lease(2, 1), None, Some(Bytes::from_static(b"d")));
    let release = super::super::task_error::given_back(v1::ReleaseCause::Drain);
    book.finish(&lease(2, 1), release, start);
    let frames = book.flush(start);
    assert_eq!(names(&frames), ["outcomes"]);
    let Frame::Outcomes(outcomes) = &frames[0] else { panic!("no outcomes") };
    let Some(Outcome::Release(release)) = &outcomes.items[0].outcome else { panic!("no release") };
    assert_eq!(release.checkpoint.as_deref(), Some(&b"d"[..]));
}

#[test]
fn a_new_stream_is_told_everything_that_was_not_answered() {
    let (mut book, start) = open();
    for n in 0..4 {
        book.assign(&assignment(n, 1), start);
    }
    book.news(&lease(0, 1), None, Some(Bytes::from_static(b"c")));
    book.finish(&lease(3, 1), done(), start);
    book.flush(start + SECOND);
    book.ack_receipt(&lease(1, 1), None);
    let (held, unreceipted) = book.statement();
    assert_eq!((held.len(), unreceipted), (3, vec![lease(3, 1)]));

    let later = start + 2 * SECOND;
    book.welcome(&welcome(), later);
    let frames = book.flush(later);
    assert_eq!(names(&frames), ["acks", "beat", "outcomes"]);
    assert_eq!(acks(&frames), 2);
    let said = beat(&frames).held.iter().filter(|held| held.checkpoint.is_some()).count();
    assert_eq!(said, 1);
}

#[test]
fn news_over_the_frame_limit_wait_for_the_next_beat() {
    let (mut book, start) = open();
    for n in 0..20 {
        book.assign(&assignment(n, 1), start);
        book.news(&lease(n, 1), None, Some(vec![0; limits::MAX_CHECKPOINT_BYTES].into()));
    }
    let mut said = 0;
    for round in 1..=2 {
        let frames = book.flush(start + SECOND * round);
        let beat = beat(&frames);
        assert_eq!(beat.held.len(), 20);
        assert!(prost::Message::encoded_len(beat) <= limits::MAX_MESSAGE_BYTES);
        said += beat.held.iter().filter(|held| held.checkpoint.is_some()).count();
        book.beat_answered(beat.sequence);
    }
    assert_eq!(said, 20);
}

#[test]
fn a_new_capacity_is_said_once() {
    let (mut book, start) = open();
    book.set_capacity(0);
    assert!(book.next_due() <= start);
    assert_eq!(names(&book.flush(start)), ["capacity"]);
    assert!(book.flush(start).is_empty());
}
