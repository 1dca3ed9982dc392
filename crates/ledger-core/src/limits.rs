//! Every limit of the ledger in one table, checked by the daemon and told to workers.

use std::time::Duration;

/// Largest gRPC message, in bytes: the default limit of every gRPC client.
pub const MESSAGE_BYTES: usize = 4 << 20;
/// Largest payload, in bytes.
pub const PAYLOAD_BYTES: usize = 1 << 20;
/// Largest result, in bytes.
pub const RESULT_BYTES: usize = 1 << 20;
/// Largest checkpoint, in bytes.
pub const CHECKPOINT_BYTES: usize = 256 << 10;
/// Longest error message, in bytes.
pub const ERROR_MESSAGE_BYTES: usize = 4 << 10;
/// Longest error detail, in bytes.
pub const ERROR_DETAIL_BYTES: usize = 16 << 10;
/// Longest error code, in bytes.
pub const ERROR_CODE_BYTES: usize = 128;
/// Longest progress note, reason or actor, in bytes.
pub const NOTE_BYTES: usize = 1 << 10;
/// Longest question of a blocked task, in bytes.
pub const QUESTION_BYTES: usize = 4 << 10;
/// Most labels of a task or worker.
pub const LABELS: usize = 64;
/// Longest label key, in bytes.
pub const LABEL_KEY_BYTES: usize = 63;
/// Longest label value, in bytes.
pub const LABEL_VALUE_BYTES: usize = 255;
/// Most items of one call or frame.
pub const ITEMS: usize = 1_000;
/// Longest request id or idempotency key, in bytes.
pub const KEY_BYTES: usize = 256;
/// Longest task type, in bytes.
pub const TASK_TYPE_BYTES: usize = 128;
/// Longest worker id, in bytes.
pub const WORKER_ID_BYTES: usize = 128;
/// Longest agent name, in bytes.
pub const AGENT_BYTES: usize = 63;
/// Longest W3C traceparent, in bytes.
pub const TRACEPARENT_BYTES: usize = 128;
/// Longest W3C tracestate, in bytes.
pub const TRACESTATE_BYTES: usize = 512;
/// Most agents of the ledger.
pub const AGENTS: usize = 10_000;
/// Most agents one worker serves.
pub const WORKER_AGENTS: usize = 64;
/// Most task types one worker names.
pub const WORKER_TYPES: usize = 256;
/// Largest capacity of a worker.
pub const CAPACITY: u32 = 10_000;
/// Most operations of one batch of the loop: beyond it bulk throughput was measured to fall.
pub const BATCH_OPERATIONS: usize = 3_000;
/// Most bytes of one batch of the loop.
pub const BATCH_BYTES: usize = 8 << 20;
/// Assignments are cut into frames of this size, in bytes.
pub const FRAME_BYTES: usize = 1 << 20;
/// A session with more unsent bytes than this has no room.
pub const UNSENT_BYTES: usize = 1 << 20;
/// How far ahead `run_at` may lie.
pub const RUN_AT_AHEAD: Duration = Duration::from_secs(366 * 24 * 3_600);
/// Deliveries in a row without an ended attempt after which a task is undeliverable.
pub const IDLE_DELIVERIES: u32 = 20;
/// Ack timeouts in a row after which a session has no room.
pub const UNACKED_RUN: u32 = 3;
/// Releases for drain or preemption in a row that are free; those beyond count as idle deliveries.
pub const FREE_RELEASES: u32 = 100;
/// Blocks in a row that end by themselves after which a task fails: nobody answers, and it does nothing else.
pub const BLOCKS: u32 = 1_000;
/// What losses weigh toward POISON is forgotten so long after the last.
pub const LOSS_MEMORY: Duration = Duration::from_secs(72 * 3_600);
/// Longest answer to a blocked task, in bytes.
pub const ANSWER_BYTES: usize = 16 << 10;
/// Most follow-ups of one completion.
pub const FOLLOW_UPS: usize = 100;
/// Longest name of who did something, in bytes.
pub const ACTOR_BYTES: usize = 128;
/// Most breakers of one agent that has one per task type; further types share the agent's own.
pub const AGENT_BREAKERS: usize = 1_000;
/// Dead letters that a count or a grouping looks at.
pub const LETTERS_LOOKED_AT: usize = 100_000;
/// How long an empty budget may defer a retry.
pub const MAX_DEFER: Duration = Duration::from_secs(24 * 3_600);
/// A probe passes when its worker has sent beats for so long since the ack.
pub const PROBE_PASSES_AFTER: Duration = Duration::from_secs(60);
/// How long an answer is remembered under its request id.
pub const REQUEST_MEMORY: Duration = Duration::from_secs(24 * 3_600);
/// Results of refused outcomes kept for salvage, per task.
pub const SALVAGED: usize = 3;
/// Longest WaitTask.
pub const WAIT: Duration = Duration::from_secs(60);
/// Ended tasks that one commit removes: few, since whoever calls meanwhile waits for it.
pub const REMOVED_AT_ONCE: usize = 50;
/// Rows of workers, and events of agents, that one commit removes.
pub const FORGOTTEN_AT_ONCE: usize = 1_000;
