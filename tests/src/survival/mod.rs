//! What must be so of leases and devices whatever became of the broker, its workers and the kernel.
//! Looks from outside: at the simulated kernel and at the records, while no broker is at anything.

mod cases;
mod ground;
mod scrubs;
mod steps;

pub use cases::{count, each, few, told};
pub use ground::{Done, Ground};
pub use scrubs::Scrubbed;
pub use steps::{Place, numbering, places};

/// The functions of the graphics card, in one group.
pub const GPU: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];
/// A virtual function whose physical function has `sriov_drivers_autoprobe` off.
pub const VF: &str = "0000:07:10.0";
/// Another one, with a group of its own.
pub const OTHER_VF: &str = "0000:07:10.2";
/// A kind of mediated devices.
pub const SERIAL: &str = "mtty/mtty-2";
/// A virtual function that can be given time and interrupt vectors, on a host driver.
pub const SHAPED: &str = "0000:08:00.1";
/// What it is given, as `trial` takes it.
pub const SETTINGS: [&str; 2] = ["msix=8", "exec_quantum=20"];
/// A physical function without virtual ones.
pub const NUMBERED: &str = "0000:09:00.0";
/// The root disk.
pub const DISK: &str = "0000:02:00.0";
/// A function that another tenant has while all this happens.
pub const BYSTANDER: &str = "0000:00:14.0";
