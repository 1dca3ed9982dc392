//! The work whose instructions `just counts` counts: each row once without and once with the operation in its loop.
//!
//! Alone it only prints the names of its rows. `.ci/counts` runs it under callgrind, which writes one dump for each
//! [`measured`]: the first of a row is the loop with the inputs alone, the second has the operation too.

mod leaves;
mod tasks;

use std::hint::black_box;

/// Runs `op` so often, with the number of the call. Callgrind counts what happens in here, and nothing else.
#[inline(never)]
fn measured(calls: u32, mut op: impl FnMut(u32)) {
    for call in 0..black_box(calls) {
        op(call);
    }
}

/// One row: `inputs` makes the arguments out of the optimizer's sight, `op` does the same and uses them.
fn row(name: &str, calls: u32, inputs: impl FnMut(u32), op: impl FnMut(u32)) {
    println!("{name}\t{calls}");
    measured(calls, inputs);
    measured(calls, op);
}

fn main() {
    leaves::rows();
    tasks::rows();
}
