//! Who waits for a lock on a server, and how often for long.

use super::psql;
use crate::failure::Failure;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A wait for a lock that is told of.
const LONG_WAIT: &str = "10 ms";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// How many waits for a lock over [`LONG_WAIT`] there are in so many seconds, by what is waited for. One session looks all the
/// time: to begin one for each look would cost as much as a good part of the load.
pub(super) async fn long(bin: &Path, url: &str, seconds: u64) -> Result<BTreeMap<String, u64>, Failure> {
    // It ends its transaction each time, or it would keep dead rows from going.
    let look = format!(
        "DO $$ \
        DECLARE \
            ends timestamptz := clock_timestamp() + interval '{seconds} s'; \
            seen jsonb := '{{}}'; \
            found jsonb; \
        BEGIN \
            WHILE clock_timestamp() < ends LOOP \
                SELECT jsonb_object_agg(concat_ws(' ', pid, waitstart), concat_ws(' ', locktype, relation::regclass)) \
                INTO found FROM pg_locks \
                WHERE NOT granted AND waitstart < clock_timestamp() - interval '{LONG_WAIT}'; \
                seen := seen || COALESCE(found, '{{}}'); \
                COMMIT; \
                PERFORM pg_sleep({}); \
                COMMIT; \
            END LOOP; \
            PERFORM set_config('ledgerd.waits', seen::text, false); \
        END $$",
        LOOK.as_secs_f64(),
    );
    let tell =
        "SELECT count(*), value FROM jsonb_each_text(current_setting('ledgerd.waits')::jsonb) GROUP BY value";
    let told = psql(bin, url, &[&look, tell]).await?;
    let waits = told.lines().filter_map(|line| {
        let (count, what) = line.split_once('|')?;
        Some((what.to_owned(), count.parse().ok()?))
    });
    Ok(waits.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_long_wait_is_counted_once() {
        let Ok(url) = std::env::var("LEDGERD_TEST_POSTGRES_URL") else { return };
        let bin = std::env::var("LEDGERD_TEST_POSTGRES_BIN").expect("it comes with the address");
        let bin = Path::new(&bin);
        let make = ["DROP TABLE IF EXISTS bench_waits", "CREATE TABLE bench_waits ()"];
        psql(bin, &url, &make).await.expect("it is made");
        // Until somebody looks, and some looks longer.
        let hold = ["DO $$ BEGIN \
            LOCK TABLE bench_waits; \
            WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'DO __ DECLARE%') LOOP \
                PERFORM pg_stat_clear_snapshot(), pg_sleep(0.01); \
            END LOOP; \
            PERFORM pg_sleep(0.5); \
        END $$"];
        let (seen, ..) = tokio::join!(long(bin, &url, 3), psql(bin, &url, &hold), psql(bin, &url, &hold));
        // Of two, the second waits for the first; other tests may wait for others.
        assert_eq!(seen.expect("it looks").get("relation bench_waits"), Some(&1));
        psql(bin, &url, &["DROP TABLE bench_waits"]).await.expect("it goes");
    }
}
