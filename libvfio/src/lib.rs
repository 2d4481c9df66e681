//! PCI functions, IOMMU groups, SR-IOV, resets and VFIO: what a host has, what may be given to a
//! guest, and the steps that do it.
//!
//! Assigning a device is a *transition* of a whole IOMMU group from the host's drivers to a guest
//! and back. An [`Inventory`](inventory::Inventory) is read from an explicit
//! [`HostRoot`](host::HostRoot); [`plan`] turns it and a request into [`Step`](step::Step)s or a
//! [`Refusal`](plan::Refusal); [`step`] alone changes the kernel.
//!
//! ```no_run
//! use libvfio::{host::HostRoot, inventory::Inventory, plan};
//!
//! let host = HostRoot::new("/");
//! let inventory = Inventory::scan(&host)?;
//! let request = plan::Request { devices: vec![inventory.resolve("gpu")?], ..Default::default() };
//! for step in plan::attach(&inventory, &plan::Circumstances::default(), &request)?.steps {
//!     println!("{step}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Modules are a ladder: each imports only those above it in this list.

pub mod address;
pub mod error;
pub mod host;
pub mod ids;
pub mod modalias;
pub mod pci;

mod members;

pub mod mediated;

pub mod assigned;

pub mod acl;
pub mod holders;
pub mod inventory;
pub mod iommu;
pub mod memlock;
pub mod protection;
pub mod quirks;
pub mod scrub;
pub mod shape;

pub mod backend;
pub mod policy;

pub mod plan;

pub mod step;

pub mod kvm;
pub mod vfio;

pub mod readiness;

#[cfg(feature = "client")]
pub mod client;
