//! Arguments of a program with places for task data: `{{payload.prompt}}`.
//!
//! Each template is one argument of the program and stays one, whatever the data holds: no shell reads it. A string is
//! inserted as it is, anything else as JSON. Templates are checked when the worker starts, so that a misspelt place is
//! a usage error and not a thousand failed tasks; a field that a payload lacks is that task's permanent failure.

use serde_json::Value;

/// The facts of a task that arguments may name.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) task_id: &'a str,
    pub(crate) agent: &'a str,
    pub(crate) task_type: &'a str,
    pub(crate) attempt: u32,
    pub(crate) delivery: u32,
    pub(crate) fence: u64,
    pub(crate) priority: i32,
    pub(crate) payload: &'a [u8],
}

/// The arguments of a program.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Template {
    args: Vec<Vec<Part>>,
    allow_dashes: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Fact(Fact),
    Payload(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fact {
    TaskId,
    Agent,
    TaskType,
    Attempt,
    Delivery,
    Fence,
    Priority,
}

impl Template {
    /// Reads arguments; the error is a sentence for people.
    pub(crate) fn parse(args: &[String], allow_dashes: bool) -> Result<Self, String> {
        let args = args.iter().map(|arg| parse_arg(arg)).collect::<Result<_, _>>()?;
        Ok(Self { args, allow_dashes })
    }

    /// The arguments for one task, or why this task can never have them.
    pub(crate) fn fill(&self, facts: &Facts<'_>) -> Result<Vec<String>, String> {
        let wants_payload = self.args.iter().flatten().any(|part| matches!(part, Part::Payload(_)));
        let payload = if wants_payload {
            serde_json::from_slice(facts.payload).map_err(|error| {
                format!("the payload is not JSON, and the arguments name its fields: {error}")
            })?
        } else {
            Value::Null
        };
        let mut filled = Vec::with_capacity(self.args.len());
        let mut options_ended = false;
        for parts in &self.args {
            let arg = self.fill_arg(parts, facts, &payload, options_ended)?;
            options_ended |= parts == &[Part::Text("--".into())];
            filled.push(arg);
        }
        Ok(filled)
    }

    fn fill_arg(
        &self,
        parts: &[Part],
        facts: &Facts<'_>,
        payload: &Value,
        options_ended: bool,
    ) -> Result<String, String> {
        let mut arg = String::new();
        for part in parts {
            match part {
                Part::Text(text) => arg.push_str(text),
                Part::Fact(fact) => arg.push_str(&fact.of(facts)),
                Part::Payload(path) => {
                    let name = place(path);
                    match find(payload, path) {
                        None => return Err(format!("the payload has no field for {name}")),
                        Some(Value::String(text)) => {
                            if text.contains('\0') {
                                return Err(format!("{name} holds a NUL byte, which no argument can carry"));
                            }
                            // Who enqueues must not pick the program's options: a prompt that reads
                            // `--skip-permissions` would be one.
                            if arg.is_empty() && text.starts_with('-') && !options_ended && !self.allow_dashes
                            {
                                return Err(format!(
                                    "{name} begins with `-` and would be read as an option; put `--` before it in \
                                     the command, or start the worker with --allow-dashes"
                                ));
                            }
                            arg.push_str(text);
                        }
                        Some(value) => arg.push_str(&value.to_string()),
                    }
                }
            }
        }
        Ok(arg)
    }
}

impl Fact {
    fn of(self, facts: &Facts<'_>) -> String {
        match self {
            Self::TaskId => facts.task_id.into(),
            Self::Agent => facts.agent.into(),
            Self::TaskType => facts.task_type.into(),
            Self::Attempt => facts.attempt.to_string(),
            Self::Delivery => facts.delivery.to_string(),
            Self::Fence => facts.fence.to_string(),
            Self::Priority => facts.priority.to_string(),
        }
    }
}

/// Whether an argument has a place in it.
pub(crate) fn has_place(arg: &str) -> bool {
    arg.contains("{{")
}

fn parse_arg(arg: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = arg;
    while let Some(open) = rest.find("{{") {
        text.push_str(&rest[..open]);
        rest = &rest[open + 2..];
        if let Some(after) = rest.strip_prefix("{{") {
            text.push_str("{{");
            rest = after;
            continue;
        }
        let close = rest
            .find("}}")
            .ok_or_else(|| format!("`{arg}` opens a place with {{{{ and does not close it"))?;
        let part = parse_place(rest[..close].trim())?;
        if !text.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut text)));
        }
        parts.push(part);
        rest = &rest[close + 2..];
    }
    text.push_str(rest);
    if !text.is_empty() || parts.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts)
}

fn parse_place(name: &str) -> Result<Part, String> {
    let mut segments = name.split('.');
    if segments.next() == Some("payload") {
        let path: Vec<String> = segments.map(Into::into).collect();
        if path.iter().all(|segment| !segment.is_empty()) {
            return Ok(Part::Payload(path));
        }
    }
    Ok(Part::Fact(match name {
        "task_id" => Fact::TaskId,
        "agent" => Fact::Agent,
        "task_type" => Fact::TaskType,
        "attempt" => Fact::Attempt,
        "delivery" => Fact::Delivery,
        "fence" => Fact::Fence,
        "priority" => Fact::Priority,
        _ => {
            return Err(format!(
                "{{{{{name}}}}} names nothing; use payload, payload.FIELD, task_id, agent, task_type, attempt, \
                 delivery, fence or priority, and write {{{{{{{{ for a literal {{{{"
            ));
        }
    }))
}

/// A number in a path is an index where the payload has an array.
fn find<'v>(payload: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(payload, |value, segment| match value {
        Value::Object(fields) => fields.get(segment),
        Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
        _ => None,
    })
}

fn place(path: &[String]) -> String {
    let mut name = String::from("{{payload");
    for segment in path {
        name.push('.');
        name.push_str(segment);
    }
    name.push_str("}}");
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill_with(payload: &str, args: &[&str], allow_dashes: bool) -> Result<Vec<String>, String> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).into()).collect();
        let facts = Facts {
            task_id: "t1k3",
            agent: "claude",
            task_type: "review",
            attempt: 2,
            delivery: 3,
            fence: 7,
            priority: 5,
            payload: payload.as_bytes(),
        };
        Template::parse(&args, allow_dashes)?.fill(&facts)
    }

    fn fill(payload: &str, args: &[&str]) -> Result<Vec<String>, String> {
        fill_with(payload, args, false)
    }

    #[test]
    fn strings_go_in_raw_and_other_values_as_json() {
        let payload =
            r#"{"prompt":"say \"hi\"; $(rm -rf /)","n":4,"deep":{"list":[1,{"x":null}]},"yes":true}"#;
        let args =
            ["-p", "{{payload.prompt}}", "n={{ payload.n }}!", "{{payload.deep}}", "{{payload.deep.list.1}}"];
        assert_eq!(
            fill(payload, &args).expect("filled"),
            ["-p", "say \"hi\"; $(rm -rf /)", "n=4!", r#"{"list":[1,{"x":null}]}"#, r#"{"x":null}"#]
        );
    }

    #[test]
    fn task_facts_have_places_and_need_no_json_payload() {
        let args =
            ["{{task_id}}-{{attempt}}", "{{agent}}/{{task_type}}", "{{delivery}}{{fence}}{{priority}}", ""];
        assert_eq!(fill("not json", &args).expect("filled"), ["t1k3-2", "claude/review", "375", ""]);
    }

    #[test]
    fn a_missing_field_is_named() {
        let sentence = fill(r#"{"a":{"b":1}}"#, &["{{payload.a.c}}"]).expect_err("missing");
        assert_eq!(sentence, "the payload has no field for {{payload.a.c}}");
        assert!(fill(r#"{"a":1}"#, &["{{payload.a.b}}"]).is_err());
        assert!(fill("[1]", &["{{payload.1}}"]).is_err());
        assert!(fill("nope", &["{{payload.a}}"]).expect_err("no JSON").contains("not JSON"));
    }

    #[test]
    fn a_misspelt_place_is_refused_before_any_task() {
        for arg in ["{{payloda.x}}", "{{}}", "{{payload.}}", "{{payload..a}}", "{{task_id"] {
            assert!(Template::parse(&[arg.into()], false).is_err(), "{arg}");
        }
    }

    #[test]
    fn four_braces_are_two() {
        assert_eq!(fill("{}", &["{{{{.ID}}", "}}"]).expect("filled"), ["{{.ID}}", "}}"]);
    }

    #[test]
    fn data_cannot_become_an_option() {
        let payload = r#"{"p":"--skip","n":-5,"z":"a\u0000b"}"#;
        assert!(fill(payload, &["{{payload.p}}"]).expect_err("an option").contains("--allow-dashes"));
        assert_eq!(fill(payload, &["--", "{{payload.p}}"]).expect("filled"), ["--", "--skip"]);
        assert_eq!(fill(payload, &["x={{payload.p}}", "{{payload.n}}"]).expect("filled"), ["x=--skip", "-5"]);
        assert_eq!(fill_with(payload, &["{{payload.p}}"], true).expect("filled"), ["--skip"]);
        assert!(fill(payload, &["{{payload.z}}"]).expect_err("NUL").contains("NUL"));
    }
}
