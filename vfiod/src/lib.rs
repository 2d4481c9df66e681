//! The daemon: one owner of device assignment on a host, for everyone on the bus.
//!
//! [`broker`] decides and remembers, [`service`] speaks D-Bus, [`transition`] carries steps out,
//! [`ledger`] keeps leases through restarts, [`quarantine`] remembers devices not trusted,
//! [`history`] what happened, [`authority`] asks who may, [`uevent`] listens.

pub mod authority;
pub mod broker;
pub mod daemon;
mod durable;
pub mod history;
pub mod lease;
pub mod ledger;
pub mod quarantine;
pub mod request;
pub mod service;
pub mod stores;
pub mod transition;
pub mod uevent;
