//! The lab: a virtual machine with a real kernel, a real IOMMU and PCI devices to assign.
//!
//! Without the feature `lab` only what its host needs is built: the machine and the language.

pub mod dice;
pub mod machine;
pub mod protocol;
pub mod seeds;

#[cfg(feature = "sim")]
pub mod binaries;
#[cfg(any(feature = "lab", feature = "sim"))]
pub mod conformance;
#[cfg(feature = "lab")]
pub mod lab;

#[cfg(feature = "sim")]
pub mod processor;

#[cfg(feature = "sim")]
pub mod session;

#[cfg(feature = "sim")]
pub mod sim;

#[cfg(feature = "trial")]
pub mod survival;
#[cfg(feature = "trial")]
pub mod trial;
