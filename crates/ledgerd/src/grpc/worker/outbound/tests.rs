use super::*;
use crate::ledger::command::{Receipt, Recorded};
use futures_util::StreamExt;
use ledger_core::store::TaskData;
use ledger_core::{Reason, SessionId, State, TaskId};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

struct Rig {
    out: Outbound,
    ledger: mpsc::UnboundedSender<ToWorker>,
    side: mpsc::UnboundedSender<Side>,
    flow: Arc<Flow>,
    unsent: Unsent,
}

async fn rig() -> Rig {
    let (ledger, outbox) = mpsc::unbounded_channel();
    let (side, lane) = mpsc::unbounded_channel();
    let unsent = Unsent::default();
    let opened = Opened {
        session: SessionId(1),
        verdicts: Vec::new(),
        heartbeat_interval: Duration::from_secs(20),
        idle_interval: Duration::from_secs(15),
        ack_delay_max: Duration::from_secs(1),
        outbox,
        unsent: unsent.clone(),
    };
    let flow = Arc::new(Flow::new());
    let out = Outbound::new(opened, Arc::clone(&flow), lane, CancellationToken::new().drop_guard());
    let mut rig = Rig { out, ledger, side, flow, unsent };
    assert!(matches!(rig.frame().await, Frame::Welcome(_)), "Welcome is first");
    rig
}

impl Rig {
    async fn frame(&mut self) -> Frame {
        self.out.next().await.expect("a frame").expect("no end").frame.expect("a frame")
    }

    fn say(&self, said: ToWorker) {
        self.ledger.send(said).expect("the stream is there");
    }
}

fn receipt(task: u64) -> Receipt {
    let recorded = Recorded {
        state: State::Done,
        reason: Reason::None,
        version: 3,
        run_at: None,
        follow_ups: Vec::new(),
    };
    Receipt { task: TaskId(task), fence: 1, is_ack: false, result: Ok(recorded) }
}

fn assignment(task: u64, bytes: usize) -> Assignment {
    Assignment {
        task: TaskId(task),
        fence: 1,
        agent: "claude".into(),
        task_type: "t".into(),
        delivery: 1,
        attempt: 1,
        priority: 5,
        ack_timeout: Duration::from_secs(10),
        time_left: None,
        lease_duration: Duration::from_secs(60),
        data: Arc::new(TaskData { payload: vec![0; bytes].into(), ..TaskData::default() }),
        checkpoint: None,
        last_error: None,
        question: None,
        answer: None,
    }
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_merged_and_cut_at_the_frame_limit() {
    let mut rig = rig().await;
    let size = FRAME_BYTES / 2 - 1_000;
    rig.unsent.add(size * 5);
    rig.say(ToWorker::Receipts(vec![receipt(1)]));
    rig.say(ToWorker::Assignments((1..=3).map(|n| assignment(n, size)).collect()));
    rig.say(ToWorker::Receipts(vec![receipt(2)]));
    rig.say(ToWorker::Assignments((4..=5).map(|n| assignment(n, size)).collect()));
    rig.say(ToWorker::HeartbeatAck(Vec::new(), 7));
    let Frame::Receipts(receipts) = rig.frame().await else { panic!("receipts") };
    assert_eq!(receipts.items.len(), 2, "in one frame");
    for expected in [2, 2, 1] {
        let Frame::Assignments(frame) = rig.frame().await else { panic!("assignments") };
        assert_eq!(frame.items.len(), expected);
    }
    assert_eq!(rig.unsent.bytes(), 0);
    assert!(rig.flow.has_room_again(), "the ledger is told once it is below the limit");
    assert!(!rig.flow.has_room_again());
    assert!(matches!(rig.frame().await, Frame::HeartbeatAck(ack) if ack.sequence == 7));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_stream_says_that_it_lives() {
    let mut rig = rig().await;
    let start = Instant::now();
    assert!(matches!(rig.frame().await, Frame::Idle(_)));
    assert_eq!(start.elapsed().as_secs(), 15);
    assert!(matches!(rig.frame().await, Frame::Idle(_)));
    assert_eq!(start.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_drained_stream_ends_at_its_deadline() {
    let mut rig = rig().await;
    let start = Instant::now();
    rig.say(ToWorker::Drain(Duration::from_secs(5)));
    assert!(matches!(rig.frame().await, Frame::Drain(_)));
    rig.say(ToWorker::Receipts(vec![receipt(1)]));
    assert!(matches!(rig.frame().await, Frame::Receipts(_)), "receipts go on until then");
    let end = rig.out.next().await.expect("an end").expect_err("an end");
    assert_eq!((end.code(), start.elapsed().as_secs()), (tonic::Code::Unavailable, 5));
    assert!(rig.out.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_nobody_reads_is_told_from_one_with_nothing_to_say() {
    let mut rig = rig().await;
    let limit = Duration::from_secs(30);
    rig.say(ToWorker::Receipts(vec![receipt(1)]));
    assert!(matches!(rig.frame().await, Frame::Receipts(_)));
    tokio::time::advance(limit).await;
    assert!(rig.flow.is_stalled(limit), "a frame went out and the transport never came back");
    assert!(matches!(rig.frame().await, Frame::Idle(_)), "it is due");
    assert!(timeout(Duration::ZERO, rig.out.next()).await.is_err(), "nothing more");
    tokio::time::advance(limit).await;
    assert!(!rig.flow.is_stalled(limit), "it waits for us");
    rig.side.send(Side::End(Refused::Stalled.into())).expect("the stream is there");
    let end = rig.out.next().await.expect("an end").expect_err("an end");
    assert_eq!(end.code(), tonic::Code::ResourceExhausted);
}

#[tokio::test(start_paused = true)]
async fn the_ledger_may_end_a_stream_and_so_may_the_worker() {
    let mut superseded = rig().await;
    superseded.say(ToWorker::End(LedgerError::WorkerSuperseded("w".into())));
    let end = superseded.out.next().await.expect("an end").expect_err("an end");
    assert_eq!(end.code(), tonic::Code::Aborted);

    let Rig { mut out, ledger, flow, .. } = rig().await;
    ledger.send(ToWorker::Receipts(vec![receipt(1)])).expect("the stream is there");
    flow.inbound_ended();
    drop(ledger);
    assert!(out.next().await.expect("the last receipts").is_ok());
    assert!(out.next().await.is_none(), "a clean end");

    let Rig { mut out, ledger, .. } = rig().await;
    drop(ledger);
    let end = out.next().await.expect("an end").expect_err("an end");
    assert_eq!(end.code(), tonic::Code::Unavailable, "the ledger is gone");
}
