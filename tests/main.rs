//! Promises, tested through the real binary and its wire. One binary, so that linking stays quick; one file a promise.

mod support;

mod admin;
mod breaker;
mod delivery;
mod drain;
mod durability;
mod leases;
mod retries;
mod wire;
