//! The daemon: one owner of device assignment on a host, for everyone on the bus.
//!
//! [`broker`] decides and remembers, [`service`] speaks D-Bus, [`transition`] has steps carried out
//! by [`worker`] processes, [`ledger`] keeps leases through restarts, [`quarantine`] remembers
//! devices not trusted, [`met`] devices in their places, [`history`] what happened, [`boot`] what
//! became of the policy at boot, [`initramfs`] what of it the next one begins with, [`owner`] waits
//! for whom leases end with, [`authority`] asks who may, [`uevent`] listens, [`libvirt`] reads domains,
//! [`simulation`] offers a host without devices, `memory` gives back what is free.

pub mod authority;
pub mod boot;
pub mod broker;
pub mod cleaned;
#[cfg(feature = "crash-points")]
pub mod crash;
#[cfg(not(feature = "crash-points"))]
mod crash;
pub mod daemon;
mod durable;
pub mod history;
pub mod initramfs;
pub mod lease;
pub mod ledger;
pub mod libvirt;
mod memory;
pub mod met;
pub mod owner;
pub mod quarantine;
pub mod request;
pub mod service;
pub mod simulation;
pub mod stores;
pub mod transition;
pub mod uevent;
pub mod worker;
