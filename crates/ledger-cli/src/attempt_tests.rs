use std::sync::Mutex;
use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::child::tests::{Fifo, guard, within};

const LONG: Duration = Duration::from_secs(60);

fn plan(script: &str) -> Plan {
    let args = ["-c".to_owned(), script.to_owned(), "sh".into(), "{{payload.word}}".into()];
    Plan {
        program: "/bin/sh".into(),
        template: Template::parse(&args, false).expect("arguments"),
        guard: guard(),
        timeout: None,
        grace: LONG,
        drain: LONG,
        checkpoint_name: None,
        codes: Codes { retry: vec![75], permanent: vec![78] },
    }
}

fn task() -> Attempt {
    Attempt {
        task_id: "t1k3".into(),
        agent: "claude".into(),
        task_type: "review".into(),
        attempt: 2,
        delivery: 3,
        fence: 7,
        priority: 5,
        payload: r#"{"word":"two words; $HOME"}"#.into(),
        ..Attempt::default()
    }
}

async fn run(plan: &Plan, task: Attempt) -> Result<String, String> {
    let outcome = timeout(LONG, plan.run(task, &Signals::default(), |_| {})).await.expect("it ends");
    outcome
        .map(|done| String::from_utf8(done.result.into()).expect("text"))
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn the_program_gets_the_task_and_its_output_is_the_result() {
    let script = "echo \"$1\"; cat; echo; echo $LEDGERD_TASK_ID $LEDGERD_AGENT $LEDGERD_TASK_TYPE $LEDGERD_ATTEMPT \
                  $LEDGERD_DELIVERY $LEDGERD_FENCE $LEDGERD_PRIORITY $LEDGERD_DEADLINE $TRACEPARENT $TRACESTATE $BAGGAGE";
    let given = Attempt {
        deadline: Some("2026-01-31T09:00:00Z".into()),
        traceparent: "00-a-b-01".into(),
        tracestate: "k=v".into(),
        baggage: "tenant=acme".into(),
        ..task()
    };
    assert_eq!(
        run(&plan(script), given).await.expect("done"),
        "two words; $HOME\n{\"word\":\"two words; $HOME\"}\nt1k3 claude review 2 3 7 5 2026-01-31T09:00:00Z 00-a-b-01 k=v tenant=acme\n"
    );
    let absent =
        "echo ${LEDGERD_DEADLINE-none} ${TRACEPARENT-none} ${BAGGAGE-none} ${LEDGERD_CHECKPOINT-none}";
    assert_eq!(run(&plan(absent), task()).await.expect("done"), "none none none none\n");
}

#[tokio::test]
async fn an_answer_is_given_with_its_question() {
    let script = plan("echo \"${LEDGERD_QUESTION-none}: ${LEDGERD_ANSWER-none}\"");
    let asked = Attempt { question: "which branch?".into(), ..task() };
    let answered = Attempt { answer: "main; $HOME".into(), ..asked.clone() };
    assert_eq!(run(&script, answered).await.expect("done"), "which branch?: main; $HOME\n");
    assert_eq!(run(&script, asked).await.expect("done"), "none: none\n", "nobody answered");
    assert_eq!(run(&script, task()).await.expect("done"), "none: none\n");
}

#[tokio::test]
async fn exit_codes_decide() {
    for (script, told) in [
        ("echo first >&2; echo 'no  quota' >&2; echo >&2; exit 75", "no  quota (TRANSIENT)"),
        ("echo 'no repo' >&2; exit 78", "no repo (PERMANENT)"),
        ("exit 1", "the program ended with exit code 1 (UNKNOWN)"),
        ("kill -6 $$", "the program was ended by signal 6 (UNKNOWN)"),
    ] {
        let error = run(&plan(script), task()).await.expect_err(script);
        assert_eq!(error.to_uppercase(), told.to_uppercase(), "{script}");
    }
    let script = "echo 'no repo' >&2; exit 3";
    let mut plan = plan(script);
    plan.codes.permanent = vec![3];
    let error = plan.run(task(), &Signals::default(), |_| {}).await.expect_err(script);
    let text = format!("{error:?}");
    assert!(text.contains("EXIT_3") && text.contains("detail: \"no repo\\n\""), "{text}");
}

#[tokio::test]
async fn a_detail_is_the_end_and_within_its_limit_whatever_the_bytes() {
    let mut tail = Tail::new(DETAIL_LIMIT);
    tail.push(&[0xff; 100_000]);
    let text = detail(&tail);
    assert!(text.len() <= DETAIL_LIMIT && text.len() > DETAIL_LIMIT - 4);
}

#[tokio::test]
async fn a_payload_without_the_field_is_a_permanent_failure() {
    let given = Attempt { payload: "{}".into(), ..task() };
    let error = run(&plan("echo never"), given).await.expect_err("no field");
    assert!(error.starts_with("the payload has no field for {{payload.word}}"), "{error}");
}

#[tokio::test]
async fn arguments_the_system_refuses_are_a_permanent_failure() {
    let payload = format!("{{\"word\":\"{}\"}}", "x".repeat(300_000));
    let error =
        run(&plan("echo never"), Attempt { payload: payload.into(), ..task() }).await.expect_err("too long");
    assert!(error.starts_with("the arguments are longer than the system allows"), "{error}");
}

#[tokio::test]
async fn a_checkpoint_goes_to_the_program_and_back() {
    let mut plan = plan("cat $LEDGERD_CHECKPOINT; echo next > $LEDGERD_CHECKPOINT; exit 1");
    plan.checkpoint_name = Some("ck.json".into());
    let shared = Mutex::new(Vec::new());
    let given = Attempt { checkpoint: Some("earlier".into()), ..task() };
    let share = |checkpoint| shared.lock().expect("no panic").push(checkpoint);
    plan.run(given, &Signals::default(), share).await.expect_err("exit code 1");
    assert_eq!(shared.into_inner().expect("no panic"), ["next\n"]);
}

#[tokio::test]
async fn an_earlier_checkpoint_can_be_read_without_a_name() {
    let given = Attempt { checkpoint: Some("earlier".into()), ..task() };
    assert_eq!(run(&plan("cat $LEDGERD_CHECKPOINT"), given).await.expect("done"), "earlier");
}

#[tokio::test]
async fn a_program_over_its_time_is_stopped() {
    let mut plan = plan("echo late >&2; exec sleep 1000");
    plan.timeout = Some(Duration::from_millis(300));
    let error = run(&plan, task()).await.expect_err("over its time");
    assert!(error.starts_with("the program ran longer than 300ms"), "{error}");
}

#[tokio::test]
async fn a_program_that_stops_when_asked_is_not_done() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let plan = plan(&format!("trap 'exit 0' TERM; {} sleep 1000 & wait", fifo.hold()));
    let signals = Signals::default();
    let (outcome, ()) = tokio::join!(timeout(LONG, plan.run(task(), &signals, |_| {})), async {
        within(ready).await;
        signals.cancelled.cancel();
    });
    assert_eq!(outcome.expect("it ends").expect_err("stopped").to_string(), "cancelled");
    within(gone).await;
}

#[tokio::test]
async fn a_drain_stops_the_program_and_leaves_the_outcome_to_the_worker() {
    let fifo = Fifo::new();
    let (ready, gone) = fifo.watch();
    let plan = plan(&(fifo.hold() + "sleep 1000"));
    let signals = Signals::default();
    let running = plan.run(task(), &signals, |_| {});
    tokio::pin!(running);
    let drained = async {
        within(ready).await;
        signals.draining.cancel();
        within(gone).await;
    };
    tokio::select! {
        outcome = &mut running => panic!("an outcome of its own: {outcome:?}"),
        () = drained => {}
    }
}

#[tokio::test]
async fn a_drain_lets_the_program_finish() {
    let fifo = Fifo::new();
    let (ready, _gone) = fifo.watch();
    // Without a grace the whole drain is the program's.
    let mut plan = plan(&(fifo.hold() + "cat > /dev/null; echo done"));
    plan.grace = Duration::ZERO;
    let signals = Signals::default();
    signals.draining.cancel();
    let outcome = timeout(LONG, plan.run(task(), &signals, |_| {})).await.expect("it ends");
    assert_eq!(outcome.expect("done").result, "done\n");
    within(ready).await;
}

#[test]
fn the_line_of_an_attempt_is_one_line() {
    let took = Duration::from_millis(1_250);
    assert_eq!(
        line(&task(), &Ok(Done { result: "123".into(), follow_ups: vec![] }), took),
        "t1k3 attempt 2 after 1s250ms: done, 3 bytes"
    );
    let text = line(&task(), &Err(TaskError::fatal("a\nb\u{1b}")), took);
    assert!(text.contains("a b\\u{1b}") && !text.contains('\n'), "{text}");
}

#[tokio::test]
async fn a_reply_asks_hints_and_names_what_follows() {
    let reply =
        |json: &str, code: u8| plan(&format!("printf '%s' '{json}' > \"$LEDGERD_REPLY\"; exit {code}"));
    for (json, code, said) in [
        (r#"{"question":"which?"}"#, 0, "waits: which?"),
        (r#"{"question":"which?","block_for":"1h"}"#, 75, "waits"),
        (r#"{"retry_after":"30s","class":"overloaded","code":"429"}"#, 75, "OVERLOADED"),
        (r#"{"class":"nothing"}"#, 1, "which is none"),
        (r#"{"follow_up":[]}"#, 0, "not understood"),
        (r#"{"follow_ups":[{"payload":1}]}"#, 0, "follow_ups[0]"),
        ("{", 0, "not understood"),
    ] {
        let error = run(&reply(json, code), task()).await.expect_err(json);
        assert!(error.to_lowercase().contains(&said.to_lowercase()), "{json}: {error}");
    }
    let json =
        r#"{"follow_ups":[{"task_type":"x","payload":[1, 2]},{"agent":"b","task_type":"y","key":"k"}]}"#;
    let done = reply(json, 0).run(task(), &Signals::default(), |_| {}).await.expect("done");
    let followed: Vec<_> =
        done.follow_ups.iter().map(|task| (&*task.agent, &*task.task_type, &task.payload[..])).collect();
    assert_eq!(followed, [("claude", "x", &b"[1, 2]"[..]), ("b", "y", b"")]);
    assert_eq!(run(&reply("", 0), task()).await, Ok(String::new()));
}
