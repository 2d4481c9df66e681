//! The daemon: one owner of device assignment on a host, for everyone on the bus.
//!
//! [`broker`] decides and remembers, [`service`] speaks D-Bus, [`transition`] carries steps out,
//! [`ledger`] keeps leases through restarts, [`authority`] asks who may, [`uevent`] listens,
//! [`simulation`] offers a host without devices.

pub mod authority;
pub mod broker;
pub mod daemon;
pub mod lease;
pub mod ledger;
pub mod request;
pub mod service;
pub mod simulation;
pub mod transition;
pub mod uevent;
