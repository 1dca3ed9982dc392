//! What a configuration may hold, at and just beyond each limit.

use crate::support::{ms, secs};
use retry_core::{BucketConfig, Config, Jitter};
use std::time::Duration;

const NANO: Duration = Duration::from_nanos(1);
const DAY: Duration = Duration::from_secs(86_400);

fn refused(config: Config) -> Vec<&'static str> {
    match config.build() {
        Ok(_) => Vec::new(),
        Err(errors) => errors.errors().iter().map(|error| error.field).collect(),
    }
}

#[test]
fn limits_are_inclusive_and_anything_beyond_is_refused() {
    let base = Config::default();
    let accepted = [
        Config { max_retries: 0, ..base },
        Config { max_retries: 1_000, ..base },
        Config { base_delay: Duration::ZERO, max_delay: Duration::ZERO, ..base },
        Config { base_delay: DAY, max_delay: DAY, ..base },
        Config { max_delay: 7 * DAY, ..base },
        Config { exponential_base: 1.0, ..base },
        Config { exponential_base: 10.0, ..base },
        Config { jitter: Jitter::Proportional(0.0), ..base },
        Config { jitter: Jitter::Proportional(1.0), ..base },
        Config { max_elapsed: Some(NANO), ..base },
        Config { hint_max: DAY, ..base },
        Config { hint_max: Duration::ZERO, ..base },
        Config { max_losses: 1, ..base },
        Config { max_losses: 1_000, ..base },
    ];
    for config in accepted {
        assert!(refused(config).is_empty(), "{config:?}");
    }
    let rejected = [
        ("max_retries", Config { max_retries: 1_001, ..base }),
        ("max_retries", Config { max_retries: u32::MAX, ..base }),
        ("base_delay", Config { base_delay: DAY + NANO, max_delay: 7 * DAY, ..base }),
        ("max_delay", Config { max_delay: ms(100) - NANO, ..base }),
        ("max_delay", Config { max_delay: 7 * DAY + NANO, ..base }),
        ("exponential_base", Config { exponential_base: 1.0 - f64::EPSILON, ..base }),
        ("exponential_base", Config { exponential_base: 10.000_1, ..base }),
        ("exponential_base", Config { exponential_base: -1.0, ..base }),
        ("exponential_base", Config { exponential_base: f64::NAN, ..base }),
        ("exponential_base", Config { exponential_base: f64::INFINITY, ..base }),
        ("jitter", Config { jitter: Jitter::Proportional(-0.1), ..base }),
        ("jitter", Config { jitter: Jitter::Proportional(1.000_1), ..base }),
        ("jitter", Config { jitter: Jitter::Proportional(f64::NAN), ..base }),
        ("jitter", Config { jitter: Jitter::Proportional(f64::NEG_INFINITY), ..base }),
        ("max_elapsed", Config { max_elapsed: Some(Duration::ZERO), ..base }),
        ("min_window", Config { min_window: 7 * DAY + NANO, ..base }),
        ("hint_max", Config { hint_max: DAY + NANO, ..base }),
        ("max_losses", Config { max_losses: 0, ..base }),
        ("max_losses", Config { max_losses: 1_001, ..base }),
    ];
    for (field, config) in rejected {
        assert_eq!(refused(config), [field], "{config:?}");
    }
}

#[test]
fn all_errors_come_at_once_and_name_field_value_and_rule() {
    let config = Config {
        max_retries: 5_000,
        base_delay: 2 * DAY,
        exponential_base: f64::NAN,
        max_delay: secs(1),
        jitter: Jitter::Proportional(7.0),
        ..Config::default()
    };
    let errors = config.validate().unwrap_err();
    let fields: Vec<_> = errors.errors().iter().map(|error| error.field).collect();
    assert_eq!(fields, ["max_retries", "base_delay", "exponential_base", "max_delay", "jitter"]);
    assert!(errors.to_string().starts_with("max_retries is 5000, must be 0..=1000; base_delay is "));
    assert_eq!(errors.into_iter().count(), 5);
}

#[test]
fn another_limit_keeps_the_delays_and_is_validated_too() {
    let policy = Config { max_retries: 9, jitter: Jitter::Full, ..Config::default() }.build().unwrap();
    let other = policy.with_max_retries(0).unwrap();
    assert_eq!(other, Config { max_retries: 0, ..*policy.config() }.build().unwrap());
    assert_eq!(other.delay(4, 77, ms(1)), policy.delay(4, 77, ms(1)));
    assert_ne!(other, policy);
    assert!(policy.with_max_retries(1_001).is_err());
}

#[test]
fn a_bucket_refuses_what_it_cannot_represent() {
    let base = BucketConfig::default();
    for config in [
        BucketConfig { capacity: 1, deposit: 0.0, floor: 0.0 },
        BucketConfig { capacity: 1_000_000, deposit: 1.0, floor: 1_000_000.0 },
        BucketConfig { deposit: 0.001, floor: 0.001, ..base },
    ] {
        assert!(config.build().is_ok(), "{config:?}");
    }
    for value in [f64::NAN, f64::INFINITY, -0.1, 0.000_4, 1_000_000.1] {
        let errors = BucketConfig { capacity: 0, deposit: value, floor: value }.build().unwrap_err();
        assert_eq!(errors.errors().len(), 3, "{value}");
    }
    assert!(BucketConfig { capacity: 1_000_001, ..base }.build().is_err());
    assert_eq!(base.build().unwrap(), retry_core::Limits::default());
}
