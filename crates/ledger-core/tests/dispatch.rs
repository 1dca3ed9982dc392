//! Whom to assign: turns, types, and lost tasks.

use crate::session::session;
use crate::support::{LATER, Life};
use ledger_core::dispatch::{Group, choose};
use ledger_core::session::Session;
use ledger_core::{AgentId, Event, Spec, Task, TaskId};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

fn named(mut task: Task, agent: u32, id: u64) -> Arc<Task> {
    task.id = TaskId(id);
    task.spec = Arc::new(Spec { agent: AgentId(agent), ..(*task.spec).clone() });
    task.into()
}

fn task(agent: u32, id: u64) -> Arc<Task> {
    named(Life::new().task, agent, id)
}

fn lost_by_w(agent: u32, id: u64) -> Arc<Task> {
    let mut life = Life::new();
    life.start().apply(&Event::LeaseOver);
    life.wait(LATER);
    named(life.task, agent, id)
}

fn tasks(agent: u32, ids: impl IntoIterator<Item = u64>) -> VecDeque<Arc<Task>> {
    ids.into_iter().map(|id| task(agent, id)).collect()
}

fn all_of(agent: u32) -> Group {
    (AgentId(agent), None)
}

/// Who got what: session, task.
fn hand_out(sessions: &mut [Session], offers: &mut HashMap<Group, VecDeque<Arc<Task>>>) -> Vec<(u64, u64)> {
    let mut sessions: Vec<_> = sessions.iter_mut().collect();
    choose(&mut sessions, offers).into_iter().map(|(session, task)| (session.0, task.id.0)).collect()
}

#[test]
fn sessions_take_turns_in_the_order_of_the_offer() {
    let mut sessions = [session(1, "a", &[1], 3), session(2, "b", &[1], 3)];
    let mut offers = HashMap::from([(all_of(1), tasks(1, 1..=4))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 1), (2, 2), (1, 3), (2, 4)]);
}

#[test]
fn a_session_goes_round_its_agents_and_goes_on_where_it_stopped() {
    let mut sessions = [session(1, "a", &[1, 2, 3], 2)];
    let offers = || HashMap::from([1, 2, 3].map(|agent| (all_of(agent), tasks(agent, [agent.into()]))));
    assert_eq!(hand_out(&mut sessions, &mut offers()), [(1, 1), (1, 2)]);
    assert_eq!(hand_out(&mut sessions, &mut offers()), [(1, 3), (1, 1)]);
}

#[test]
fn a_busy_agent_does_not_crowd_out_another() {
    let mut sessions = [session(1, "a", &[1, 2], 4)];
    let mut offers = HashMap::from([(all_of(1), tasks(1, 1..=10)), (all_of(2), tasks(2, 21..=22))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 1), (1, 21), (1, 2), (1, 22)]);
}

#[test]
fn nobody_gets_more_than_its_room() {
    let mut sessions = [session(1, "a", &[1], 1), session(2, "b", &[1], 0), session(3, "c", &[1], 2)];
    sessions[2].held.insert(TaskId(99));
    let mut offers = HashMap::from([(all_of(1), tasks(1, 1..=9))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 1), (3, 2)]);
}

#[test]
fn a_session_is_offered_its_own_group_alone() {
    let mut sessions = [session(1, "a", &[1], 2), session(2, "b", &[2], 2)];
    sessions[0].types = Some(["resize".into()].into());
    let mut offers = HashMap::from([
        (all_of(1), tasks(1, [1])),
        ((AgentId(1), sessions[0].types.clone()), tasks(1, [2])),
        (all_of(2), tasks(2, [3])),
    ]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 2), (2, 3)]);
}

#[test]
fn two_groups_of_one_agent_never_get_the_same_task() {
    let mut sessions = [session(1, "a", &[1], 5), session(2, "b", &[1], 5)];
    sessions[1].types = Some(["thumbnail".into()].into());
    let mut offers = HashMap::from([
        (all_of(1), tasks(1, 1..=6)),
        ((AgentId(1), sessions[1].types.clone()), tasks(1, 1..=6)),
    ]);
    let chosen = hand_out(&mut sessions, &mut offers);
    let distinct: HashSet<_> = chosen.iter().map(|(_, task)| *task).collect();
    assert_eq!((chosen.len(), distinct.len()), (6, 6), "{chosen:?}");
}

#[test]
fn a_lost_task_goes_to_another_worker_where_there_is_one() {
    let mut sessions = [session(1, "w", &[1], 2), session(2, "b", &[1], 2)];
    let mut offers = HashMap::from([(all_of(1), VecDeque::from([lost_by_w(1, 1), task(1, 2)]))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 2), (2, 1)]);
}

#[test]
fn a_lost_task_goes_to_the_same_worker_when_it_is_alone() {
    let mut alone = [session(1, "w", &[1], 2)];
    let mut offers = HashMap::from([(all_of(1), VecDeque::from([lost_by_w(1, 1)]))]);
    assert_eq!(hand_out(&mut alone, &mut offers), [(1, 1)]);
    // Others do not count that have no room, serve another agent, or take other types.
    let mut others = [
        session(1, "w", &[1], 2),
        session(2, "full", &[1], 0),
        session(3, "other", &[2], 2),
        session(4, "picky", &[1], 2),
    ];
    others[3].types = Some(["crop".into()].into());
    let mut offers = HashMap::from([(all_of(1), VecDeque::from([lost_by_w(1, 1)]))]);
    assert_eq!(hand_out(&mut others, &mut offers), [(1, 1)]);
}

#[test]
fn a_lost_task_that_passed_through_the_breaker_still_prefers_another_worker() {
    let mut life = Life::new();
    life.lose_once();
    life.apply(&Event::Gate);
    let gated = named(life.task.clone(), 1, 1);
    life.apply(&Event::Ungate);
    let freed = named(life.task, 1, 1);
    for lost in [gated, freed] {
        let mut sessions = [session(1, "w", &[1], 2), session(2, "b", &[1], 2)];
        let mut offers = HashMap::from([(all_of(1), VecDeque::from([lost]))]);
        assert_eq!(hand_out(&mut sessions, &mut offers), [(2, 1)]);
    }
}

#[test]
fn a_lost_task_is_not_kept_for_a_worker_that_was_not_offered_it() {
    let mut sessions = [session(1, "w", &[1], 5), session(2, "b", &[1], 2)];
    sessions[1].types = Some(["thumbnail".into()].into());
    let picky = (AgentId(1), sessions[1].types.clone());
    let mut offers =
        HashMap::from([(all_of(1), VecDeque::from([task(1, 1), lost_by_w(1, 2)])), (picky, tasks(1, [1]))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 1), (1, 2)]);
}

#[test]
fn a_task_that_was_merely_unacknowledged_prefers_nobody() {
    let mut life = Life::new();
    life.claim();
    life.apply(&Event::LeaseOver);
    let mut sessions = [session(1, "w", &[1], 1), session(2, "b", &[1], 1)];
    let mut offers = HashMap::from([(all_of(1), VecDeque::from([named(life.task, 1, 1)]))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), [(1, 1)]);
}

#[test]
fn a_session_without_agents_gets_nothing() {
    let mut sessions = [session(1, "a", &[], 5)];
    let mut offers = HashMap::from([(all_of(1), tasks(1, [1]))]);
    assert_eq!(hand_out(&mut sessions, &mut offers), []);
}
