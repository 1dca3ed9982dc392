//! Times and durations as people type and read them.
//!
//! Typed: `90s`, `1h30m`, `250ms`; RFC 3339; a date or a time without a zone, taken as local; or a duration relative
//! to now. Printed: local time to the second, with its offset, so that a line from a terminal means the same anywhere.
//! Not a clock: `now` is an argument everywhere, and [`now`] is the one place that reads it.

use std::time::Duration;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// The wall clock. Only commands read it, once each, so that two times of one command line agree.
pub(crate) fn now() -> Timestamp {
    Timestamp::now()
}

/// Which way a time without a sign counts from now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// `10m` is in ten minutes: a start, a deadline.
    Ahead,
    /// `10m` is ten minutes ago: a filter on what has happened.
    Back,
}

/// A time as it was typed, not yet fixed to an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// An instant.
    At(Timestamp),
    /// A distance without a sign.
    Distance(SignedDuration),
    /// A distance with a sign.
    Signed(SignedDuration),
}

impl When {
    /// Reads a time; the error is a sentence for people.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "now" {
            return Ok(Self::Signed(SignedDuration::ZERO));
        }
        if let Ok(at) = text.parse::<Timestamp>() {
            return Ok(Self::At(at));
        }
        // A date has a dash in fifth place; everything else that starts with a digit is a distance.
        if text.as_bytes().get(4) == Some(&b'-') {
            let local = text.parse::<DateTime>().map_err(|_| refuse_time(text))?;
            let zoned = local.to_zoned(TimeZone::system()).map_err(|_| refuse_time(text))?;
            return Ok(Self::At(zoned.timestamp()));
        }
        let (sign, rest) = match text.as_bytes().first() {
            Some(b'-') => (Some(-1), &text[1..]),
            Some(b'+') => (Some(1), &text[1..]),
            _ => (None, text),
        };
        let distance = parse_duration(rest).map_err(|_| refuse_time(text))?;
        let distance = SignedDuration::try_from(distance).map_err(|_| refuse_time(text))?;
        Ok(match sign {
            Some(sign) => Self::Signed(distance * sign),
            None => Self::Distance(distance),
        })
    }

    /// The instant that is meant. A distance beyond the calendar ends at its edge.
    pub(crate) fn resolve(self, now: Timestamp, direction: Direction) -> Timestamp {
        let by = match (self, direction) {
            (Self::At(at), _) => return at,
            (Self::Signed(by), _) | (Self::Distance(by), Direction::Ahead) => by,
            (Self::Distance(by), Direction::Back) => -by,
        };
        now.saturating_add(by).expect("a signed duration is no calendar span, so adding it only saturates")
    }
}

fn refuse_time(text: &str) -> String {
    format!("`{text}` is no time; write 2026-01-31T09:00:00Z, 2026-01-31T09:00 (local), 10m or -1h")
}

/// Reads a duration such as `90s`, `1h30m`, `1.5h`, `250ms`. A number needs its unit: `--delay 10` has cost people
/// days by being minutes in one tool and seconds in the next.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is no duration; write 250ms, 90s, 10m, 1h30m or 2d");
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(refuse());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refuse)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            "w" => 604_800.0,
            _ => return Err(refuse()),
        };
        let seconds = number.parse::<f64>().map_err(|_| refuse())? * unit;
        // The wire holds whole milliseconds; rounding here keeps 0.1 s from becoming 99 ms.
        let millis = (seconds * 1_000.0).round();
        if !millis.is_finite() || millis > 1e15 {
            return Err(refuse());
        }
        total = total.checked_add(Duration::from_millis(millis as u64)).ok_or_else(refuse)?;
        rest = tail.trim_start();
    }
    Ok(total)
}

/// A duration in the same spelling that [`parse_duration`] reads, largest units first.
pub(crate) fn show_duration(duration: Duration) -> String {
    let mut millis = duration.as_millis();
    if millis == 0 {
        return "0s".into();
    }
    let mut text = String::new();
    for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        let count = millis / size;
        millis %= size;
        if count > 0 {
            text.push_str(&format!("{count}{unit}"));
        }
    }
    text
}

/// An instant in local time to the second.
pub(crate) fn show_time(at: Timestamp) -> String {
    show_time_in(at, TimeZone::system())
}

/// The same with the milliseconds that the ledger stores.
pub(crate) fn show_moment(at: Timestamp) -> String {
    at.to_zoned(TimeZone::system()).strftime("%Y-%m-%dT%H:%M:%S.%3f%:z").to_string()
}

fn show_time_in(at: Timestamp, zone: TimeZone) -> String {
    at.to_zoned(zone).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
}

/// To the wire's instant.
pub(crate) fn to_wire(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() }
}

/// From the wire's instant; none when it lies outside of the calendar.
pub(crate) fn from_wire(at: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(at.seconds, at.nanos).ok()
}

/// To the wire's duration.
pub(crate) fn duration_to_wire(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).expect("below 10^9"),
    }
}

/// From the wire's duration; a negative one is zero.
pub(crate) fn duration_from_wire(duration: &prost_types::Duration) -> Duration {
    let seconds = u64::try_from(duration.seconds).unwrap_or(0);
    Duration::new(seconds, u32::try_from(duration.nanos).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn durations_are_read_with_their_units() {
        for (text, millis) in [
            ("250ms", 250),
            ("90s", 90_000),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("1.5h", 5_400_000),
            ("0.1s", 100),
            ("2d", 172_800_000),
            ("1w", 604_800_000),
            ("0", 0),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn a_duration_that_could_be_misread_is_refused() {
        for text in ["", " ", "10", "-5s", "5x", "s", "1..5s", "m10", "1e9s", "99999999999999999999d", "5s!"]
        {
            let sentence = parse_duration(text).expect_err(text);
            assert!(sentence.contains("is no duration; write"), "{sentence}");
        }
    }

    #[test]
    fn shown_durations_can_be_typed_again() {
        for (millis, text) in
            [(0, "0s"), (250, "250ms"), (90_000, "1m30s"), (5_400_000, "1h30m"), (86_400_000, "1d")]
        {
            let duration = Duration::from_millis(millis);
            assert_eq!(show_duration(duration), text);
            assert_eq!(parse_duration(text), Ok(duration));
        }
    }

    #[test]
    fn relative_times_count_from_now_in_the_asked_direction() {
        let now = at("2026-01-31T09:00:00Z");
        for (text, direction, expected) in [
            ("10m", Direction::Ahead, "2026-01-31T09:10:00Z"),
            ("10m", Direction::Back, "2026-01-31T08:50:00Z"),
            ("-1h", Direction::Ahead, "2026-01-31T08:00:00Z"),
            ("-1h", Direction::Back, "2026-01-31T08:00:00Z"),
            ("+1h", Direction::Back, "2026-01-31T10:00:00Z"),
            ("now", Direction::Back, "2026-01-31T09:00:00Z"),
            ("2026-02-01T00:00:00+02:00", Direction::Back, "2026-01-31T22:00:00Z"),
        ] {
            let when = When::parse(text).expect(text);
            assert_eq!(when.resolve(now, direction), at(expected), "{text} {direction:?}");
        }
    }

    #[test]
    fn a_time_without_a_zone_is_local() {
        let local: DateTime = "2026-01-31T09:00".parse().expect("a time");
        let expected = local.to_zoned(TimeZone::system()).expect("it exists").timestamp();
        assert_eq!(When::parse("2026-01-31T09:00"), Ok(When::At(expected)));
        assert!(When::parse("2026-01-31").is_ok());
        assert!(When::parse("2026-13-31").is_err());
    }

    #[test]
    fn a_distance_beyond_the_calendar_ends_at_its_edge() {
        let when = When::parse("10000w").expect("a distance");
        assert!(when.resolve(at("9999-01-01T00:00:00Z"), Direction::Ahead) > at("9999-01-01T00:00:00Z"));
        assert!(When::parse("soon").is_err());
    }

    #[test]
    fn times_are_shown_to_the_second_with_their_offset() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        assert_eq!(show_time_in(at("2026-01-31T09:00:00.987Z"), zone), "2026-01-31T11:00:00+02:00");
    }

    #[test]
    fn wire_times_survive_the_round_trip() {
        let moment = at("2026-01-31T09:00:00.987Z");
        assert_eq!(from_wire(&to_wire(moment)), Some(moment));
        assert_eq!(from_wire(&prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }), None);
        let span = Duration::from_millis(1_500);
        assert_eq!(duration_from_wire(&duration_to_wire(span)), span);
    }
}
