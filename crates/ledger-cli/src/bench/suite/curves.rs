//! What the plots of docs/benchmarks.md are drawn from.

use std::time::Duration;

use serde::Serialize;

use super::super::Args as Load;
use super::stage::{Stage, stop};
use super::{Size, seen};
use crate::failure::Failure;
use crate::output::remark;
use crate::policy::Span;

const BATCHES: [u32; 5] = [1, 10, 100, 300, 1_000];
const CALLERS: [u32; 6] = [1, 4, 16, 64, 256, 1_024];
/// Tasks a second, ten a call from a thousand on.
const RATES: [u32; 7] = [30, 100, 300, 1_000, 5_000, 20_000, 50_000];
/// Parts in which a ledger is filled.
const PARTS: u64 = 10;

/// x and y of each.
#[derive(Debug, Serialize)]
pub(super) struct Curves {
    /// Tasks a call of 16 callers; lifecycles a second.
    batch: Vec<(u32, f64)>,
    /// Callers, one task a call; lifecycles a second.
    callers: Vec<(u32, f64)>,
    /// Tasks a second; p50 and p99 from enqueue to start in milliseconds.
    load: Vec<(u32, f64, f64)>,
    /// Tasks stored; lifecycles a second while the next tenth came.
    stored: Vec<(u64, f64)>,
}

pub(super) async fn measure(stage: &Stage, size: Size) -> Result<Curves, Failure> {
    remark("measuring the curves");
    let duration = Span(Duration::from_secs(size.seconds));
    let load = Load { duration, ..Load::default() };
    let mut curves = Curves { batch: Vec::new(), callers: Vec::new(), load: Vec::new(), stored: Vec::new() };
    for batch in BATCHES {
        curves.batch.push((batch, stage.fresh(Load { batch, ..load.clone() }).await?.0.rate()));
    }
    for callers in CALLERS {
        curves
            .callers
            .push((callers, stage.fresh(Load { callers, batch: 1, ..load.clone() }).await?.0.rate()));
    }
    for rate in RATES {
        let (batch, callers) = if rate >= 1_000 { (10, 16) } else { (1, 8) };
        let paced = Load { rate: Some(rate), batch, callers, ..load.clone() };
        let (p50, p99) = seen(stage.fresh(paced).await?.0.starts())?;
        curves.load.push((rate, p50, p99));
    }
    let mut daemon = stage.daemon("curve").await?;
    for part in 0..PARTS {
        let tenth = size.finished / PARTS;
        let part_of = Load { tasks: Some(tenth), duration: Span(Duration::from_secs(3_600)), ..load.clone() };
        curves.stored.push((part * tenth, stage.load(&mut daemon, part_of).await?.rate()));
    }
    stop(&mut daemon).await;
    Ok(curves)
}
