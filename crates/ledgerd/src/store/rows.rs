//! Rows to values, column by column in the order that the statement named them.
//!
//! Not the other way: values are bound in `write`. A stored number that means nothing is [`StoreError::Corrupt`].

use super::text;
use bytes::Bytes;
use ledger_core::store::TaskData;
use ledger_core::store::{
    AgentEvent, AgentEventKind, AgentRow, BreakerRow, BudgetRow, DeadLetter, Notes, ProgressNote, SessionRow,
    StoreError,
};
use ledger_core::watch::{Happening, Placed};
use ledger_core::{
    AgentId, EventKind, Holder, Lease, Overrides, Reason, Record, Sample, SessionId, Spec, State, Stop,
    StopCause, Task, TaskError, TaskId, Timestamp,
};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

/// The columns that [`Columns::task`] reads, of `tasks AS t` and `task_specs AS s`.
macro_rules! task_columns {
    () => {
        "t.id, t.state, t.reason, t.priority, t.run_at, t.calendar, t.deadline, t.queued_at, t.updated_at, t.version, \
         t.fence, t.delivery, t.attempt, t.idle_deliveries, t.worker, t.incarnation, t.session, \
         t.lease_until, t.acked_at, t.progress_at, t.sample_epoch, t.sample_probe, t.sample_told, t.retry_count, \
         t.losses, t.preemptions, t.redrives, t.probe_failures, t.tokens, t.previous_delay, t.stop_cause, \
         t.stop_until, t.discarded, t.loss_weight, t.lost_at, t.free_releases, t.blocks, s.agent, s.task_type, s.policy, s.created_at, s.frees_key"
    };
}
/// The columns that [`Columns::record`] reads, of `task_history AS h`.
macro_rules! record_columns {
    () => {
        "h.task_id, h.version, h.kind, h.from_state, h.to_state, h.reason, h.at, h.fence, h.attempt, h.worker, \
         h.until, h.digest, h.error, h.facts"
    };
}
/// The columns that [`Columns::placed`] reads after slot and number, of `task_history AS h` and, where it is stored,
/// `task_specs AS s`.
macro_rules! placed_columns {
    () => {
        concat!($crate::store::rows::record_columns!(), ", s.agent, s.task_type, s.labels")
    };
}
/// The columns that [`Columns::data`] reads, of `task_specs AS s`, without the payload.
macro_rules! data_columns {
    () => {
        "s.labels, s.traceparent, s.tracestate, s.key, s.digest, s.parent"
    };
}
/// The columns that [`Columns::notes`] reads, of `task_notes AS n`.
macro_rules! note_columns {
    () => {
        "n.error, n.checkpoint, n.progress_fraction, n.progress_note, n.progress_at, n.question, \
         n.answer"
    };
}
/// The columns that [`Columns::event`] reads, of `agent_events AS e`.
macro_rules! event_columns {
    () => {
        "e.seq, e.agent, e.task_type, e.at, e.kind, e.from_state, e.to_state, e.cause, e.epoch, e.actor, e.reason, \
         e.until"
    };
}
/// The columns that [`Columns::dead_letter`] reads, of `dead_letter_queue AS d`.
macro_rules! dead_letter_columns {
    () => {
        "d.task_id, d.agent, d.task_type, d.reason, d.error, d.fingerprint, d.failed_at, d.attempt, d.redrives, \
         d.discarded_at, d.discard_reason"
    };
}
pub(super) use {
    data_columns, dead_letter_columns, event_columns, note_columns, placed_columns, record_columns,
    task_columns,
};

/// A worker, and the numbers of what it holds.
type Held<'r> = (Option<Cow<'r, str>>, [Option<i64>; 8]);

/// What many rows share, kept once. A scan of a million tasks meets few types and workers, and those of one call together.
#[derive(Default)]
pub(super) struct Shared {
    texts: std::collections::HashSet<Arc<str>>,
    /// Of the row before.
    spec: Option<Arc<Spec>>,
}

impl Shared {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = text.into();
        // Bounded: types are the user's words and may be many.
        if self.texts.len() < 10_000 {
            self.texts.insert(Arc::clone(&shared));
        }
        shared
    }
}

/// A row of either database, by the place of a column. None: NULL.
pub(super) trait Cells {
    /// Whether what few tasks have is two JSON arrays, in the place of their columns.
    const PACKED: bool = false;

    fn int(&self, at: usize) -> sqlx::Result<Option<i64>>;
    fn real(&self, at: usize) -> sqlx::Result<Option<f64>>;
    fn text(&self, at: usize) -> sqlx::Result<Option<&str>>;
    fn bytes(&self, at: usize) -> sqlx::Result<Option<&[u8]>>;
}

/// Reads a row from left to right.
pub(super) struct Columns<'r, R> {
    row: &'r R,
    next: usize,
}

impl<'r, R: Cells> Columns<'r, R> {
    pub(super) const fn of(row: &'r R) -> Self {
        Self { row, next: 0 }
    }

    /// The next column, which holds what `read` takes it for.
    fn get<T>(
        &mut self,
        read: impl Fn(&'r R, usize) -> sqlx::Result<Option<T>>,
    ) -> Result<Option<T>, StoreError> {
        self.next += 1;
        read(self.row, self.next - 1).map_err(|error| self.wrong(&error))
    }

    /// The column before the next is not what it should be.
    fn wrong(&self, what: &dyn std::fmt::Display) -> StoreError {
        StoreError::Corrupt(format!("column {}: {what}", self.next - 1))
    }

    fn some<T>(&self, value: Option<T>) -> Result<T, StoreError> {
        value.ok_or_else(|| self.wrong(&"is empty"))
    }

    pub(super) fn int(&mut self) -> Result<i64, StoreError> {
        let value = self.maybe()?;
        self.some(value)
    }

    pub(super) fn maybe(&mut self) -> Result<Option<i64>, StoreError> {
        self.get(R::int)
    }

    /// The next columns, as they are.
    pub(super) fn numbers<const N: usize>(&mut self) -> Result<[Option<i64>; N], StoreError> {
        let mut numbers = [None; N];
        for number in &mut numbers {
            *number = self.maybe()?;
        }
        Ok(numbers)
    }

    fn wide_held(&mut self) -> Result<Held<'r>, StoreError> {
        Ok((self.maybe_text()?.map(Cow::Borrowed), self.numbers()?))
    }

    fn packed_held(&mut self) -> Result<Held<'r>, StoreError> {
        type Packed = (Option<String>, N, N, N, N, N, N, N, N);
        type N = Option<i64>;
        let Some(text) = self.maybe_text()? else { return Ok(Default::default()) };
        let (worker, a, b, c, d, e, f, g, h): Packed = text::read(text)?;
        Ok((worker.map(Cow::Owned), [a, b, c, d, e, f, g, h]))
    }

    fn packed_rare<const N: usize>(&mut self) -> Result<[Option<i64>; N], StoreError> {
        let Some(text) = self.maybe_text()? else { return Ok([None; N]) };
        let numbers: Vec<Option<i64>> = text::read(text)?;
        numbers.try_into().map_err(|_| self.wrong(&"is of another length"))
    }

    pub(super) fn number(&mut self) -> Result<u64, StoreError> {
        self.narrow()
    }

    /// The bits of a 64-bit digest, seed or hash.
    pub(super) fn bits(&mut self) -> Result<u64, StoreError> {
        Ok(self.int()?.cast_unsigned())
    }

    pub(super) fn narrow<T: TryFrom<i64>>(&mut self) -> Result<T, StoreError> {
        let value = self.int()?;
        T::try_from(value).map_err(|_| self.wrong(&value))
    }

    pub(super) fn flag(&mut self) -> Result<bool, StoreError> {
        Ok(self.int()? != 0)
    }

    pub(super) fn time(&mut self) -> Result<Timestamp, StoreError> {
        Ok(Timestamp::from_millis(self.int()?))
    }

    pub(super) fn maybe_time(&mut self) -> Result<Option<Timestamp>, StoreError> {
        Ok(self.maybe()?.map(Timestamp::from_millis))
    }

    pub(super) fn text(&mut self) -> Result<&'r str, StoreError> {
        let value = self.maybe_text()?;
        self.some(value)
    }

    pub(super) fn maybe_text(&mut self) -> Result<Option<&'r str>, StoreError> {
        self.get(R::text)
    }

    pub(super) fn maybe_bytes(&mut self) -> Result<Option<Bytes>, StoreError> {
        Ok(self.get(R::bytes)?.map(Bytes::copy_from_slice))
    }

    pub(super) fn bytes(&mut self) -> Result<Bytes, StoreError> {
        let value = self.maybe_bytes()?;
        self.some(value)
    }

    fn code<T>(&mut self, from: impl Fn(u8) -> Option<T>) -> Result<T, StoreError> {
        let code = self.int()?;
        let known = u8::try_from(code).ok().and_then(from);
        known.ok_or_else(|| self.wrong(&format_args!("code {code}")))
    }

    pub(super) fn task_id(&mut self) -> Result<TaskId, StoreError> {
        self.number().map(TaskId)
    }

    pub(super) fn agent(&mut self) -> Result<AgentId, StoreError> {
        self.narrow().map(AgentId)
    }

    pub(super) fn state(&mut self) -> Result<State, StoreError> {
        self.code(State::from_code)
    }

    fn error(&mut self) -> Result<Option<Arc<TaskError>>, StoreError> {
        self.maybe_text()?.map(text::error_of).transpose()
    }

    pub(super) fn task(&mut self, shared: &mut Shared) -> Result<Task, StoreError> {
        let id = self.task_id()?;
        let state = self.state()?;
        let reason = self.code(Reason::from_code)?;
        let priority = self.narrow()?;
        let run_at = self.time()?;
        let calendar = self.flag()?;
        let deadline = self.maybe_time()?;
        let queued_at = self.time()?;
        let updated_at = self.time()?;
        let version = self.number()?;
        let fence = self.number()?;
        let delivery = self.narrow()?;
        let attempt = self.narrow()?;
        let idle_deliveries = self.narrow()?;
        let (worker, held) = if R::PACKED { self.packed_held()? } else { self.wide_held()? };
        let [incarnation, session, until, acked_at, progress_at, epoch, probe, told] = held;
        let holder = worker.map(|worker| Holder {
            worker: shared.text(&worker),
            incarnation: incarnation.unwrap_or_default().cast_unsigned(),
            session: SessionId(session.unwrap_or_default().cast_unsigned()),
        });
        let time = |millis: Option<i64>| millis.map(Timestamp::from_millis);
        let lease = time(until).map(|until| Lease {
            until,
            acked_at: time(acked_at),
            progress_at: time(progress_at).unwrap_or(until),
        });
        let sample = epoch.map(|epoch| Sample { permit: permit(epoch, probe), told: told == Some(1) });
        let rare: [_; 14] = if R::PACKED { self.packed_rare()? } else { self.numbers()? };
        let [retry_count, losses, preemptions, redrives, probe_failures, tokens, previous_delay, rare @ ..] =
            rare;
        let [stop_cause, stop_until, discarded, loss_weight, lost_at, free_releases, blocks] = rare;
        // Mostly 0, which PostgreSQL stores as nothing.
        let count = |value: Option<i64>| {
            let value = value.unwrap_or_default();
            u32::try_from(value).map_err(|_| StoreError::Corrupt(format!("task {id}: a count of {value}")))
        };
        let stop = match (stop_cause, time(stop_until)) {
            (Some(cause), Some(until)) => {
                let cause = u8::try_from(cause).ok().and_then(StopCause::from_code);
                Some(Stop {
                    cause: cause.ok_or_else(|| StoreError::Corrupt(format!("task {id}: its stop")))?,
                    until,
                })
            }
            _ => None,
        };
        let agent = self.agent()?;
        let task_type = shared.text(self.text()?);
        let policy = self.maybe_text()?.map(text::policy_of).transpose()?.unwrap_or(Overrides::NONE);
        let spec = Spec { agent, task_type, policy, created_at: self.time()?, frees_key: self.flag()? };
        let spec = spec.shared(&mut shared.spec);
        let task = Task {
            id,
            spec,
            state,
            reason,
            priority,
            run_at,
            calendar,
            deadline,
            queued_at,
            updated_at,
            version,
            fence,
            delivery,
            attempt,
            retry_count: count(retry_count)?,
            losses: count(losses)?,
            loss_weight: count(loss_weight)?,
            lost_at: time(lost_at),
            idle_deliveries,
            free_releases: count(free_releases)?,
            blocks: count(blocks)?,
            preemptions: count(preemptions)?,
            redrives: count(redrives)?,
            probe_failures: count(probe_failures)?,
            tokens: count(tokens)?,
            previous_delay: count(previous_delay)?,
            holder,
            lease,
            sample,
            stop,
            discarded: discarded == Some(1),
        };
        Ok(task)
    }

    pub(super) fn record(&mut self) -> Result<Record, StoreError> {
        Ok(Record {
            task: self.task_id()?,
            version: self.number()?,
            kind: self.code(EventKind::from_code)?,
            from: match self.maybe()? {
                None => None,
                Some(code) => Some(
                    u8::try_from(code)
                        .ok()
                        .and_then(State::from_code)
                        .ok_or_else(|| StoreError::Corrupt(format!("a history row from state {code}")))?,
                ),
            },
            to: self.state()?,
            reason: self.code(Reason::from_code)?,
            at: self.time()?,
            fence: self.number()?,
            attempt: self.narrow()?,
            worker: self.maybe_text()?.map(Arc::from),
            until: self.maybe_time()?,
            digest: self.maybe()?.map(i64::cast_unsigned),
            error: self.error()?,
            facts: self.maybe_text()?.map(text::facts_of).transpose()?.unwrap_or_default(),
        })
    }

    pub(super) fn placed(&mut self, shared: &mut Shared) -> Result<Placed<Option<Happening>>, StoreError> {
        let (slot, seq, record) = (self.narrow()?, self.number()?, self.record()?);
        let (task, version) = (record.task, record.version);
        let Some(agent) = self.maybe()? else { return Ok(Placed { slot, seq, task, version, what: None }) };
        let agent = u32::try_from(agent).map(AgentId).map_err(|_| self.wrong(&agent))?;
        let task_type = shared.text(self.text()?);
        let labels = self.maybe_text()?.map(text::labels_of).transpose()?.unwrap_or_default();
        Ok(Placed { slot, seq, task, version, what: Some(Happening { record, agent, task_type, labels }) })
    }

    pub(super) fn data(&mut self, payload: Bytes) -> Result<TaskData, StoreError> {
        Ok(TaskData {
            payload,
            labels: self.maybe_text()?.map(text::labels_of).transpose()?.unwrap_or_default(),
            traceparent: self.maybe_text()?.unwrap_or_default().to_owned(),
            tracestate: self.maybe_text()?.unwrap_or_default().to_owned(),
            key: self.maybe_text()?.unwrap_or_default().into(),
            digest: self.bits()?,
            parent: self.maybe()?.map(|id| TaskId(id.cast_unsigned())),
        })
    }

    pub(super) fn notes(&mut self) -> Result<Notes, StoreError> {
        let error = self.error()?;
        let checkpoint = self.maybe_bytes()?;
        let (fraction, note, at) = (self.get(R::real)?, self.maybe_text()?, self.maybe_time()?);
        let progress = at.map(|at| ProgressNote {
            fraction: fraction.unwrap_or_default(),
            note: note.unwrap_or_default().to_owned(),
            at,
        });
        let question = self.maybe_text()?.map(Arc::from);
        Ok(Notes { error, checkpoint, progress, question, answer: self.maybe_text()?.map(Arc::from) })
    }

    pub(super) fn dead_letter(&mut self) -> Result<DeadLetter, StoreError> {
        Ok(DeadLetter {
            task: self.task_id()?,
            agent: self.agent()?,
            task_type: self.text()?.into(),
            reason: self.code(Reason::from_code)?,
            error: self.error()?,
            fingerprint: self.bits()?,
            failed_at: self.time()?,
            attempt: self.narrow()?,
            redrives: self.narrow()?,
            discarded: match (self.maybe_time()?, self.maybe_text()?) {
                (Some(at), why) => Some((at, why.unwrap_or_default().into())),
                (None, _) => None,
            },
        })
    }

    pub(super) fn agent_row(&mut self) -> Result<AgentRow, StoreError> {
        Ok(AgentRow {
            id: self.agent()?,
            name: self.text()?.into(),
            given: text::agent_of(self.text()?)?,
            created_at: self.time()?,
            pause: self.maybe_text()?.map(text::pause_of).transpose()?,
        })
    }

    pub(super) fn breaker(&mut self) -> Result<BreakerRow, StoreError> {
        let agent = self.agent()?;
        let task_type = self.text()?.into();
        let version = self.narrow()?;
        let name = self.text()?;
        let state = name.parse().map_err(|error| StoreError::Corrupt(format!("a breaker: {error}")))?;
        let epoch = self.bits()?;
        let (run, successes, reopens) = (self.narrow()?, self.narrow()?, self.narrow()?);
        let since = Duration::from_nanos(self.number()?);
        let span = |nanos: i64| Duration::from_nanos(u64::try_from(nanos).unwrap_or_default());
        let until = self.maybe()?.map(span);
        let cause = match self.maybe_text()? {
            None => None,
            Some(name) => match breaker_core::Cause::from_name(name) {
                None => return Err(StoreError::Corrupt(format!("a breaker's cause {name:?}"))),
                cause => cause,
            },
        };
        let ramp_until = self.maybe()?.map(span);
        let probes: Vec<(u8, Option<i64>)> = text::read(self.text()?)?;
        let probes = probes
            .into_iter()
            .map(|(slot, until)| breaker_core::Probe { slot, lease_until: until.map(span) })
            .collect();
        let window = self.bytes()?.to_vec();
        let digest = self.bits()?;
        let order = match (self.maybe_text()?, self.maybe_text()?) {
            (Some(actor), reason) => Some(breaker_core::Order {
                actor: actor.to_owned(),
                reason: reason.unwrap_or_default().to_owned(),
            }),
            (None, _) => None,
        };
        let [calls, good, failures, rejections, late_ok, late_err, transitions]: [u64; 7] =
            text::read(self.text()?)?;
        let snapshot = breaker_core::Snapshot {
            version,
            state,
            epoch,
            run,
            successes,
            probes,
            reopens,
            since,
            until,
            cause,
            ramp_until,
            window,
            digest,
            order,
            stats: breaker_core::Stats {
                calls,
                successes: good,
                failures,
                rejections,
                late_ok,
                late_err,
                transitions,
            },
        };
        Ok(BreakerRow {
            agent,
            task_type,
            snapshot,
            last_probe: self.maybe()?.map(|id| TaskId(id.cast_unsigned())),
        })
    }

    /// A row of `agent_events`, with its number.
    pub(super) fn event(&mut self) -> Result<(u64, AgentEvent), StoreError> {
        let (seq, agent, task_type) = (self.number()?, self.agent()?, self.text()?.into());
        let (at, code) = (self.time()?, self.maybe()?.unwrap_or_default());
        let corrupt = || StoreError::Corrupt(format!("event {seq} of an agent"));
        let state = |name: Option<&str>| name.and_then(|name| name.parse().ok()).ok_or_else(corrupt);
        let (from, to, cause, epoch) =
            (self.maybe_text()?, self.maybe_text()?, self.maybe_text()?, self.maybe()?);
        let kind = match code {
            1 => AgentEventKind::Breaker(breaker_core::Transition {
                from: state(from)?,
                to: state(to)?,
                cause: cause.and_then(breaker_core::Cause::from_name).ok_or_else(corrupt)?,
                epoch: epoch.unwrap_or_default().cast_unsigned(),
            }),
            2 => AgentEventKind::WouldOpen,
            3 => AgentEventKind::Paused,
            4 => AgentEventKind::Resumed,
            5 => AgentEventKind::Configured,
            _ => return Err(corrupt()),
        };
        let (actor, reason, until) = (self.text()?.into(), self.text()?.into(), self.maybe_time()?);
        Ok((seq, AgentEvent { agent, task_type, at, kind, actor, reason, until }))
    }

    pub(super) fn budget(&mut self) -> Result<BudgetRow, StoreError> {
        let agent = self.agent()?;
        let level = retry_core::Level { millitokens: self.number()?, updated_at: self.number()? };
        Ok(BudgetRow { agent: (agent.0 != 0).then_some(agent), level })
    }

    pub(super) fn session(&mut self) -> Result<SessionRow, StoreError> {
        Ok(SessionRow {
            worker: self.text()?.into(),
            incarnation: self.bits()?,
            session: SessionId(self.number()?),
            connected_at: self.time()?,
            beat_at: self.time()?,
            open: self.flag()?,
            shown: None,
        })
    }
}

/// A stored probe is its slot and one, so that 0 is none.
fn permit(epoch: i64, probe: Option<i64>) -> breaker_core::Permit {
    let slot = probe.unwrap_or_default().checked_sub(1).and_then(|slot| u8::try_from(slot).ok());
    breaker_core::Permit {
        epoch: epoch.cast_unsigned(),
        probe: slot.is_some(),
        slot: slot.unwrap_or_default(),
    }
}
