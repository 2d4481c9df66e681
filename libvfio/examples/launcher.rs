//! A launcher in small: leases a device over D-Bus, gets its descriptors without any privilege, tells
//! KVM of it, maps memory for it, and has it move data through the IOMMU.
//!
//! The device is QEMU's `edu` (`-device edu`, 1234:11e8), which has a DMA engine and nothing to break:
//! `cargo run -p libvfio --features client --example launcher -- 00:0a.0 alice`. A monitor does the
//! same with a guest's memory. vfio-ioctls opens groups itself, so what it does with them is written
//! out here; with iommufd its `VfioDevice::new_from_fd` takes the descriptor as it is.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use libvfio::client::{LeaseProxy, ManagerProxy};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

type Done<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// `include/uapi/linux/vfio.h` and `iommufd.h`, as far as this needs them.
mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]

    /// Numbers, the size of all of them first: every structure that these requests take is that.
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Bind {
        pub(super) argsz: u32,
        pub(super) flags: u32,
        pub(super) iommufd: i32,
        pub(super) device: u32,
        pub(super) token: u64,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Attach {
        pub(super) argsz: u32,
        pub(super) flags: u32,
        pub(super) space: u32,
        pub(super) pasid: u32,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Space {
        pub(super) size: u32,
        pub(super) flags: u32,
        pub(super) id: u32,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct SpaceMap {
        pub(super) size: u32,
        pub(super) flags: u32,
        pub(super) id: u32,
        pub(super) reserved: u32,
        pub(super) address: u64,
        pub(super) length: u64,
        pub(super) iova: u64,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Map {
        pub(super) argsz: u32,
        pub(super) flags: u32,
        pub(super) address: u64,
        pub(super) iova: u64,
        pub(super) length: u64,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Unmap {
        pub(super) argsz: u32,
        /// The space's number, with iommufd; else flags.
        pub(super) space: u32,
        pub(super) iova: u64,
        pub(super) length: u64,
    }
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Region {
        pub(super) argsz: u32,
        pub(super) flags: u32,
        pub(super) index: u32,
        pub(super) capabilities: u32,
        pub(super) size: u64,
        pub(super) offset: u64,
    }

    macro_rules! request {
        ($name:ident, $number:expr, $type:ty) => {
            nix::ioctl_readwrite_bad!($name, nix::request_code_none!(b';', $number), $type);
        };
    }
    nix::ioctl_write_int_bad!(set_iommu, nix::request_code_none!(b';', 102));
    nix::ioctl_write_ptr_bad!(set_container, nix::request_code_none!(b';', 104), i32);
    nix::ioctl_write_ptr_bad!(get_device, nix::request_code_none!(b';', 106), libc_char);
    request!(get_region, 108, Region);
    request!(map, 113, Map);
    request!(unmap, 114, Unmap);
    request!(space_unmap, 0x86, Unmap);
    request!(bind, 118, Bind);
    request!(attach, 119, Attach);
    request!(space_new, 0x81, Space);
    request!(space_map, 0x85, SpaceMap);

    #[allow(non_camel_case_types)]
    pub(super) type libc_char = std::ffi::c_char;
}

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE_1_2: i32 = 3;
/// To read and to write; the same for both interfaces but for the third, where the address is given.
const READ_WRITE: u32 = 3;
const CONFIG_REGION: u32 = 7;
/// Offset of the command register, and what it takes to answer and to reach memory.
const COMMAND: (u64, u16) = (4, 0b110);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Done {
    let mut arguments = std::env::args().skip(1);
    let (Some(device), Some(tenant)) = (arguments.next(), arguments.next()) else {
        return Err("usage: launcher DEVICE TENANT".into());
    };
    let bus = zbus::Connection::system().await?;
    let manager = ManagerProxy::new(&bus).await?;
    // However this ends, the lease does too.
    let options = [("while_connected", true.into())].into();
    let (id, path) = manager.attach(&[&device], &tenant, options).await?;
    let lease = LeaseProxy::builder(&bus).path(path).build().await?;
    let interface = lease.interface().await?;
    let (name, node) = lease.open_devices().await?.into_iter().next().ok_or("no descriptor")?;
    let iommu = File::from(OwnedFd::from(lease.open_iommu().await?));
    println!("lease {id}: {name} by {interface}");
    let address = manager.describe_device(&device).await?.address;
    let handed = Handed { interface, node: File::from(OwnedFd::from(node)), iommu };
    tell_kvm(&handed.node)?;
    exercise(&handed.open(&address)?)
}

/// What the daemon opened for us.
struct Handed {
    interface: String,
    node: File,
    iommu: File,
}

/// A device that translates by a space of its own.
struct Device {
    file: File,
    iommu: File,
    /// The space's number, with iommufd.
    space: Option<u32>,
    /// Kept open as long as the device: it holds the container.
    _group: Option<File>,
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

impl Handed {
    fn open(self, address: &str) -> Done<Device> {
        let Self { interface, node, iommu } = self;
        if interface == "group" {
            let container = iommu.as_raw_fd();
            // SAFETY: the argument is a pointer to a descriptor, which the kernel only reads.
            unsafe { ioctls::set_container(node.as_raw_fd(), &raw const container) }?;
            // SAFETY: the request takes a number.
            unsafe { ioctls::set_iommu(container, TYPE_1_2) }?;
            let name = CString::new(address)?;
            // SAFETY: the argument is a text with its end.
            let device = unsafe { ioctls::get_device(node.as_raw_fd(), name.as_ptr()) }?;
            // SAFETY: the kernel has just given us this descriptor, and nobody else knows of it.
            let file = unsafe { File::from_raw_fd(device) };
            return Ok(Device { file, iommu, space: None, _group: Some(node) });
        }
        let mut bind = ioctls::Bind {
            argsz: size::<ioctls::Bind>(),
            flags: 0,
            iommufd: iommu.as_raw_fd(),
            device: 0,
            token: 0,
        };
        // SAFETY: this and the next two are open descriptors and the structures these requests take.
        unsafe { ioctls::bind(node.as_raw_fd(), &raw mut bind) }?;
        let mut space = ioctls::Space { size: size::<ioctls::Space>(), flags: 0, id: 0 };
        // SAFETY: as above.
        unsafe { ioctls::space_new(iommu.as_raw_fd(), &raw mut space) }?;
        let mut attach =
            ioctls::Attach { argsz: size::<ioctls::Attach>(), flags: 0, space: space.id, pasid: 0 };
        // SAFETY: as above.
        unsafe { ioctls::attach(node.as_raw_fd(), &raw mut attach) }?;
        Ok(Device { file: node, iommu, space: Some(space.id), _group: None })
    }
}

/// KVM lets a guest's caches be as its device needs them once it knows of that.
fn tell_kvm(node: &File) -> Done {
    let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
    let mut new = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
        ..kvm_create_device::default()
    };
    let vfio = vm.create_device(&mut new)?;
    let descriptor: RawFd = node.as_raw_fd();
    vfio.set_device_attr(&kvm_device_attr {
        group: KVM_DEV_VFIO_GROUP,
        attr: u64::from(KVM_DEV_VFIO_GROUP_ADD),
        addr: &raw const descriptor as u64,
        flags: 0,
    })?;
    println!("KVM knows of it");
    Ok(())
}

impl Device {
    /// Lets the device reach a page of ours at an address of its own.
    fn map(&self, page: &Page, iova: u64) -> io::Result<()> {
        let (address, length) = (page.address(), Page::LENGTH as u64);
        match self.space {
            None => {
                let argsz = size::<ioctls::Map>();
                let mut map = ioctls::Map { argsz, flags: READ_WRITE, address, iova, length };
                // SAFETY: the memory stays for as long as it is mapped, and is only reached atomically.
                unsafe { ioctls::map(self.iommu.as_raw_fd(), &raw mut map) }?;
            }
            Some(id) => {
                let mut map = ioctls::SpaceMap {
                    size: size::<ioctls::SpaceMap>(),
                    flags: READ_WRITE << 1 | 1,
                    id,
                    reserved: 0,
                    address,
                    length,
                    iova,
                };
                // SAFETY: as above.
                unsafe { ioctls::space_map(self.iommu.as_raw_fd(), &raw mut map) }?;
            }
        }
        Ok(())
    }

    /// No longer lets it.
    fn unmap(&self, iova: u64) -> io::Result<()> {
        let (argsz, length) = (size::<ioctls::Unmap>(), Page::LENGTH as u64);
        let mut unmap = ioctls::Unmap { argsz, space: self.space.unwrap_or(0), iova, length };
        let request = if self.space.is_some() { ioctls::space_unmap } else { ioctls::unmap };
        // SAFETY: the descriptor is open and this is the structure that both requests take.
        unsafe { request(self.iommu.as_raw_fd(), &raw mut unmap) }?;
        Ok(())
    }

    /// Where a region is in the device's file.
    fn region(&self, index: u32) -> io::Result<u64> {
        let argsz = size::<ioctls::Region>();
        let mut region =
            ioctls::Region { argsz, flags: 0, index, capabilities: 0, size: 0, offset: 0 };
        // SAFETY: the descriptor is open and this is the structure that the request fills.
        unsafe { ioctls::get_region(self.file.as_raw_fd(), &raw mut region) }?;
        Ok(region.offset)
    }
}

/// Memory that a device may reach.
struct Page(std::ptr::NonNull<std::ffi::c_void>);

impl Page {
    const LENGTH: usize = 4096;

    fn new() -> Done<Self> {
        let length = NonZeroUsize::new(Self::LENGTH).ok_or("no length")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping that aliases nothing.
        Ok(Self(unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?))
    }

    fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Atomic, since the device may write at any time.
    fn bytes(&self) -> &[AtomicU8; Self::LENGTH] {
        // SAFETY: the mapping is as long, and lasts as long as this.
        unsafe { self.0.cast().as_ref() }
    }

    fn fill(&self, byte: u8) {
        self.bytes().iter().for_each(|place| place.store(byte, Ordering::SeqCst));
    }

    /// How many bytes of it are this.
    fn count(&self, byte: u8) -> usize {
        self.bytes().iter().filter(|place| place.load(Ordering::SeqCst) == byte).count()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, to which nothing refers any more.
        let _ = unsafe { munmap(self.0, Self::LENGTH) };
    }
}

/// `docs/specs/edu.rst` of QEMU.
struct Edu<'a> {
    device: &'a Device,
    registers: u64,
}

impl Edu<'_> {
    /// The device's own memory, as its DMA engine knows it.
    const BUFFER: u64 = 0x4_0000;
    const TO_MEMORY: u64 = 2;

    fn read(&self, register: u64) -> io::Result<u32> {
        let mut value = [0; 4];
        self.device.file.read_exact_at(&mut value, self.registers + register)?;
        Ok(u32::from_le_bytes(value))
    }

    fn write(&self, register: u64, value: u64) -> io::Result<()> {
        self.device.file.write_all_at(&value.to_le_bytes(), self.registers + register)
    }

    /// Has the device move a page, and waits for it.
    fn transfer(&self, from: u64, to: u64, direction: u64) -> Done {
        for (register, value) in [(0x80, from), (0x88, to), (0x90, Page::LENGTH as u64)] {
            self.write(register, value)?;
        }
        self.write(0x98, direction | 1)?;
        let begun = Instant::now();
        while self.read(0x98)? & 1 != 0 {
            if begun.elapsed() > Duration::from_secs(10) {
                return Err("the device does not end its transfer".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Reads the device, has it copy a page to another through its own memory, and shows that it reaches
/// nothing else.
fn exercise(device: &Device) -> Done {
    let config = device.region(CONFIG_REGION)?;
    let (offset, bits) = COMMAND;
    let mut command = [0; 2];
    device.file.read_exact_at(&mut command, config + offset)?;
    let command = u16::from_le_bytes(command) | bits;
    device.file.write_all_at(&command.to_le_bytes(), config + offset)?;

    let edu = Edu { device, registers: device.region(0)? };
    let identity = edu.read(0)?;
    if identity & 0xff != 0xed {
        return Err(format!("{identity:08x} is no edu device").into());
    }
    println!("it is {identity:08x}");

    let (source, target) = (Page::new()?, Page::new()?);
    let at = [0x10_0000, 0x20_0000];
    // Before anything is mapped for it, and for as long as the mappings last.
    source.fill(0x5a);
    target.fill(0);
    device.map(&source, at[0])?;
    device.map(&target, at[1])?;
    edu.transfer(at[0], Edu::BUFFER, 0)?;
    edu.transfer(Edu::BUFFER, at[1], Edu::TO_MEMORY)?;
    let copied = target.count(0x5a);
    if copied != Page::LENGTH {
        return Err(format!("only {copied} bytes came back").into());
    }
    println!("round trip: {copied} bytes");

    source.fill(0xa5);
    edu.transfer(at[0], Edu::BUFFER, 0)?;
    device.unmap(at[1])?;
    edu.transfer(Edu::BUFFER, at[1], Edu::TO_MEMORY)?;
    let kept = target.count(0x5a);
    if kept != Page::LENGTH {
        return Err(format!("the device changed {} bytes outside", Page::LENGTH - kept).into());
    }
    println!("outside {:#x}: {kept} bytes unchanged", at[1]);
    Ok(())
}
