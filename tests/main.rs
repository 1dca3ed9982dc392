//! Promises, tested through the real binary and its wire. One binary, so that linking stays quick; one file a promise.

mod support;

mod admin;
mod agents;
mod backup;
mod behaviours;
mod bench;
mod breaker;
mod callers;
mod cli;
mod delivery;
mod drain;
mod durability;
mod exec;
mod explain;
mod guide;
mod leases;
mod letters;
mod moving;
mod orders;
mod postgres;
mod postgres_servers;
mod power_loss;
mod replicas;
mod restarts;
mod retention;
mod retries;
mod sdk;
mod telemetry;
mod timers;
mod tls;
mod waiting;
mod watching;
mod wire;
