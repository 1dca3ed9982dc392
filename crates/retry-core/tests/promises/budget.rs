//! The token bucket: what fills it, what empties it, what a crash may not change.

use crate::support::{ms, secs};
use retry_core::{Bucket, BucketConfig, Empty, Level, Limits, Paid, reserve_both, reserve_with_floor};
use std::time::Duration;

const NOW: Duration = Duration::from_secs(1_000);

fn limits(capacity: u32, deposit: f64, floor: f64) -> Limits {
    BucketConfig { capacity, deposit, floor }.build().unwrap()
}

fn empty(limits: Limits) -> Bucket {
    Bucket::restore(limits, Level { millitokens: 0, updated_at: 1_000_000 })
}

#[test]
fn ten_successes_pay_for_one_retry() {
    let mut bucket = empty(limits(10, 0.1, 0.0));
    for _ in 0..9 {
        assert!(bucket.deposit(NOW));
        assert!(!bucket.withdraw(NOW, 1));
    }
    assert!(bucket.deposit(NOW));
    assert!(bucket.withdraw(NOW, 1));
    assert_eq!(bucket.available(NOW), 0);
}

#[test]
fn a_deposit_into_a_full_bucket_changes_nothing() {
    let mut bucket = Bucket::full(Limits::default(), NOW);
    let before = bucket.clone();
    assert!(!bucket.deposit(NOW + secs(5)));
    assert_eq!(bucket, before);
}

#[test]
fn the_floor_arrives_without_any_success_up_to_the_capacity() {
    let bucket = empty(Limits::default());
    for (after, millitokens) in [(0, 0), (9, 0), (10, 1), (10_000, 1_000), (10_009, 1_000), (1 << 40, 10_000)]
    {
        assert_eq!(bucket.available(NOW + ms(after)), millitokens, "{after} ms");
    }
}

#[test]
fn the_floor_loses_nothing_however_often_somebody_asks() {
    for rate in [0.3, 0.333, 1.5, 7.001, 999.999] {
        let mut bucket = empty(limits(1_000_000, 0.0, rate));
        for step in 0..=100_000 {
            // A deposit of nothing still brings the bucket up to date.
            bucket.deposit(NOW + ms(step));
        }
        assert_eq!(bucket.level().millitokens as f64, (rate * 100_000.0).round(), "{rate}/s");
    }
}

#[test]
fn time_running_backwards_mints_nothing_and_neither_does_time_lived_twice() {
    let mut bucket = empty(limits(100, 0.0, 1.0));
    assert!(bucket.withdraw(NOW + secs(10), 10));
    for _ in 0..5 {
        assert_eq!(bucket.available(NOW), 0);
        assert!(!bucket.withdraw(NOW, 1));
        assert!(!bucket.deposit(Duration::ZERO));
        assert!(!bucket.withdraw(NOW + secs(10), 1));
    }
    assert!(bucket.withdraw(NOW + secs(11), 1));
}

#[test]
fn a_bucket_is_restored_as_saved_and_never_full() {
    let mut bucket = Bucket::full(Limits::default(), NOW);
    assert!(bucket.withdraw(NOW, 10));
    for _ in 0..100 {
        // A crash loop: no tokens appear but those that time has paid for.
        bucket = Bucket::restore(Limits::default(), bucket.level());
        assert!(!bucket.withdraw(NOW + ms(9_999), 1));
    }
    assert_eq!(bucket.level(), Level { millitokens: 0, updated_at: 1_000_000 });
    let cut = Bucket::restore(limits(3, 0.1, 0.1), Level { millitokens: u64::MAX, updated_at: u64::MAX });
    assert_eq!(cut.available(NOW), 3_000);
}

#[test]
fn next_at_is_the_first_millisecond_at_which_a_withdrawal_succeeds() {
    for rate in [0.1, 0.3, 0.333, 1.0, 7.001, 1_234.5] {
        for tokens in 1..=3 {
            let bucket = empty(limits(3, 0.1, rate));
            let at = bucket.next_at(NOW, tokens).unwrap();
            assert!(bucket.clone().withdraw(at, tokens), "{rate}/s, {tokens}");
            assert!(!bucket.clone().withdraw(at - ms(1), tokens), "{rate}/s, {tokens}");
        }
    }
    let full = Bucket::full(limits(3, 0.1, 0.0), NOW);
    assert_eq!(full.next_at(NOW, 3), Some(NOW));
    assert_eq!(full.next_at(NOW, 0), Some(NOW));
    assert_eq!(full.next_at(NOW, 4), None);
    assert_eq!(empty(limits(3, 0.1, 0.0)).next_at(NOW, 1), None);
}

#[test]
fn a_refund_gives_back_and_never_overfills() {
    let mut bucket = Bucket::full(limits(5, 0.1, 0.0), NOW);
    assert!(bucket.withdraw(NOW, 2));
    bucket.refund(2);
    assert_eq!(bucket.available(NOW), 5_000);
    bucket.refund(u32::MAX);
    assert_eq!(bucket.available(NOW), 5_000);
    assert!(!bucket.withdraw(NOW, u32::MAX));
    assert!(bucket.withdraw(NOW, 0));
}

#[test]
fn both_buckets_pay_or_neither() {
    let (mut own, mut shared) =
        (Bucket::full(limits(2, 0.0, 0.0), NOW), Bucket::full(limits(3, 0.0, 0.0), NOW));
    assert_eq!(reserve_both(&mut own, &mut shared, NOW, 2), Ok(()));
    assert_eq!(reserve_both(&mut own, &mut shared, NOW, 1), Err(Empty::Own));
    assert_eq!((own.available(NOW), shared.available(NOW)), (0, 1_000));
    own.refund(2);
    assert_eq!(reserve_both(&mut own, &mut shared, NOW, 2), Err(Empty::Shared));
    assert_eq!((own.available(NOW), shared.available(NOW)), (2_000, 1_000));
}

#[test]
fn an_empty_shared_bucket_never_delays_an_owner_below_its_own_floor() {
    let mine = limits(10, 0.1, 0.1);
    let (mut own, mut shared) = (Bucket::full(mine, NOW), empty(limits(100, 0.0, 0.0)));
    let mut floor = Bucket::restore(mine.floor_only(2), Level { millitokens: 0, updated_at: 1_000_000 });
    let mut paid = 0;
    for second in 0..=100 {
        let answer = reserve_with_floor(&mut own, &mut shared, &mut floor, NOW + secs(second), 1);
        match answer {
            Ok(Paid::OwnFloor) => paid += 1,
            other => assert_eq!(other, Err(Empty::Shared)),
        }
    }
    assert_eq!(paid, 10, "0.1 a second over 100 s");
    let mut shared = Bucket::full(mine, NOW);
    assert_eq!(reserve_with_floor(&mut own, &mut shared, &mut floor, NOW, 1), Ok(Paid::Both));
}

#[test]
fn replicas_together_never_have_more_floor_than_the_cluster() {
    let whole = limits(100, 0.1, 1.0);
    for replicas in [0, 1, 2, 3, 7, 1_000, u32::MAX] {
        let each = whole.shared_by(replicas, 2).floor();
        assert!(each * u64::from(replicas.max(1)) <= 1_000, "{replicas}");
    }
}

#[test]
fn replicas_together_hold_what_one_held_and_each_can_pay_the_dearest() {
    let held = |capacity, replicas| limits(capacity, 0.1, 1.0).shared_by(replicas, 2).capacity();
    assert_eq!([1, 2, 3].map(|replicas| held(10, replicas)), [10_000, 5_000, 3_333]);
    assert_eq!(held(10, 100), 2_000);
    assert_eq!(held(1, 3), 1_000, "no more than there was");
}

#[test]
fn new_limits_hold_from_now_on() {
    let mut bucket = empty(limits(10, 0.1, 1.0));
    bucket.resize(limits(4, 0.1, 0.1), NOW + secs(3));
    assert_eq!(bucket.available(NOW + secs(3)), 3_000);
    assert_eq!(bucket.available(NOW + secs(5)), 3_200);
    bucket.resize(limits(1, 0.1, 0.1), NOW + secs(5));
    assert_eq!(bucket.available(NOW + secs(5)), 1_000);
    assert_eq!(bucket.limits().capacity(), 1_000);
}

#[test]
fn the_ends_of_time_are_inputs_like_any_other() {
    let mut bucket = Bucket::full(limits(1_000_000, 1.0, 1_000_000.0), Duration::MAX);
    assert!(bucket.withdraw(Duration::MAX, 1_000_000));
    assert!(bucket.deposit(Duration::ZERO));
    assert_eq!(bucket.available(Duration::MAX), 1_000);
    assert!(bucket.next_at(Duration::ZERO, 1_000_000).is_some());
    bucket.resize(Limits::default(), Duration::MAX);
    assert_eq!(bucket.limits(), Limits::default());
}
