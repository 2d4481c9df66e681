//! Configuration spaces sound, broken and hostile.

use super::*;

fn put(space: &mut [u8], at: usize, bytes: &[u8]) {
    space[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A physical function with the capabilities a large GPU has, each where its neighbour points.
fn gpu() -> Vec<u8> {
    let mut space = vec![0; 4096];
    put(&mut space, 0x00, &[0xde, 0x10, 0x30, 0x23, 0x06, 0x04, 0x10, 0x00]);
    put(&mut space, 0x08, &[0xa1, 0x00, 0x02, 0x03, 0x00, 0x00, 0x80, 0x00]);
    put(&mut space, 0x2c, &[0xde, 0x10, 0xc1, 0x16]);
    put(&mut space, 0x34, &[0x40]);
    put(&mut space, 0x3d, &[0x01]);
    // Power management: D3hot, keeps its state, wakes from D3cold.
    put(&mut space, 0x40, &[0x01, 0x48, 0x03, 0x80, 0x0b, 0x00]);
    // MSI: 16 vectors, off.
    put(&mut space, 0x48, &[0x05, 0x60, 0x88, 0x00]);
    // PCI Express endpoint: FLR, x16 at 32 GT/s, now x8 at 16 GT/s.
    put(&mut space, 0x60, &[0x10, 0xa0, 0x02, 0x00, 0x00, 0x00, 0x00, 0x10]);
    put(&mut space, 0x6c, &[0x05, 0x01]);
    put(&mut space, 0x72, &[0x84, 0x00]);
    // MSI-X: 9 vectors, on, table in BAR 2. The pointer's low bits are to be ignored.
    put(&mut space, 0xa0, &[0x11, 0xb3, 0x08, 0x80, 0x02, 0x10, 0x00, 0x00]);
    put(&mut space, 0xb0, &[0x09, 0xc0]);
    put(&mut space, 0xc0, &[0x13, 0xd0, 0x06, 0x03]);
    put(&mut space, 0xd0, &[0x03, 0x00]);
    let mut member = |at: u16, id: u16, next: u16, registers: &[(u16, u16)]| {
        for (offset, value) in [(0, id), (2, next << 4 | 0x2)].iter().chain(registers) {
            put(&mut space, usize::from(at + offset), &value.to_le_bytes());
        }
    };
    member(0x100, 0x01, 0x150, &[]);
    member(0x150, 0x03, 0x160, &[(0x4, 0x2211), (0x6, 0x4433), (0x8, 0x6655), (0xa, 0x8877)]);
    member(0x160, 0x0d, 0x170, &[(0x4, 0x005f), (0x6, 0x001d)]);
    member(0x170, 0x0f, 0x180, &[(0x6, 0x8000)]);
    let (counts, places) = ([(0xc, 32), (0xe, 31), (0x10, 4)], [(0x14, 4), (0x16, 1)]);
    member(0x180, 0x10, 0x1d0, &[&[(0x8, 1), (0x1a, 0x2331)], &counts[..], &places[..]].concat());
    member(0x1d0, 0x15, 0x200, &[(0x4, 0x7000), (0x8, 0x0820)]);
    member(0x200, 0x1b, 0x210, &[(0x6, 0x0001)]);
    member(0x210, 0x13, 0x230, &[(0x4, 0x0001)]);
    member(0x230, 0x0e, 0x240, &[]);
    member(0x240, 0x1d, 0x250, &[]);
    // Taken out.
    member(0x250, 0x00, 0x260, &[]);
    member(0x260, 0x2e, 0x000, &[]);
    space
}

#[test]
fn a_whole_space_is_known_whole() {
    let space = parse(&gpu());
    assert_eq!(space.problems, []);
    assert!(space.alive);
    let header = Header {
        vendor: 0x10de,
        device: 0x2330,
        command: 0x0406,
        status: 0x0010,
        revision: 0xa1,
        class: 0x03_0200,
        header_type: HeaderType::Endpoint { subsystem_vendor: 0x10de, subsystem_device: 0x16c1 },
        multifunction: true,
        interrupt_pin: 1,
    };
    assert_eq!(space.header, Some(header));
    let pcie = PciExpress {
        port_type: PortType::Endpoint,
        flr: true,
        slot_implemented: false,
        hotplug: false,
        link: Some(Link {
            max_speed: LinkSpeed(5),
            max_width: 16,
            current_speed: LinkSpeed(4),
            current_width: 8,
        }),
    };
    let power = PowerManagement { state: 3, no_soft_reset: true, wakes_from_d3cold: true };
    let capabilities = [
        Capability::PowerManagement(power),
        Capability::Msi { vectors: 16, enabled: false },
        Capability::PciExpress(pcie),
        Capability::Msix { vectors: 9, enabled: true, table_bar: 2 },
        Capability::VendorSpecific,
        Capability::AdvancedFeatures { flr: true },
        Capability::Other(0x03),
    ];
    assert_eq!(space.capabilities, capabilities);
    assert_eq!(space.pcie(), Some(&pcie));
    assert!(space.has_flr());
}

#[test]
fn the_extended_list_is_known_whole() {
    let space = parse(&gpu());
    let acs = Acs { capable: AcsFlags(0x5f), enabled: AcsFlags(0x1d) };
    let serial = SerialNumber(0x8877_6655_4433_2211);
    let sriov = SrIov {
        initial_vfs: 32,
        total_vfs: 31,
        num_vfs: 4,
        vf_offset: 4,
        vf_stride: 1,
        vf_device: 0x2331,
        enabled: true,
    };
    let bar = ResizableBar { bar: 0, sizes: 0x700, current: 8 };
    let extended = [
        ExtendedCapability::Aer,
        ExtendedCapability::SerialNumber(serial),
        ExtendedCapability::Acs(acs),
        ExtendedCapability::Ats { enabled: true },
        ExtendedCapability::SrIov(sriov),
        ExtendedCapability::ResizableBar(vec![bar]),
        ExtendedCapability::Pasid { enabled: true },
        ExtendedCapability::Pri { enabled: true },
        ExtendedCapability::Ari,
        ExtendedCapability::Dpc,
        ExtendedCapability::Other { id: 0x2e, version: 2 },
    ];
    assert_eq!(space.extended, extended);
    assert_eq!(space.acs(), Some(&acs));
    assert_eq!(space.serial(), Some(serial));
    assert_eq!(space.sriov(), Some(&sriov));
}

#[test]
fn cut_anywhere_what_is_left_is_true_and_what_is_missing_is_said() {
    let bytes = gpu();
    let whole = parse(&bytes);
    for length in 0..bytes.len() {
        let space = parse(&bytes[..length]);
        let capabilities = || whole.capabilities.iter().filter(|c| space.capabilities.contains(c));
        assert!(capabilities().eq(&space.capabilities), "{length}");
        let extended = || whole.extended.iter().filter(|c| space.extended.contains(c));
        assert!(extended().eq(&space.extended), "{length}");
        let same = space.header == whole.header
            && space.capabilities == whole.capabilities
            && space.extended == whole.extended;
        assert_eq!(same, space.problems.is_empty(), "{length}: {:?}", space.problems);
    }
}

#[test]
fn an_unprivileged_reader_learns_the_header() {
    let space = parse(&gpu()[..64]);
    assert_eq!(space.header, parse(&gpu()).header);
    assert_eq!(space.problems, [ConfigProblem::Truncated { coverage: 64 }]);
    assert_eq!(space.capabilities, []);
}

#[test]
fn conventional_pci_ends_at_256_bytes() {
    let mut bytes = gpu()[..256].to_vec();
    put(&mut bytes, 0x48, &[0x05, 0xa0]); // skips PCI Express
    let space = parse(&bytes);
    assert_eq!(space.problems, []);
    assert_eq!(space.pcie(), None);
}

#[test]
fn a_capability_at_the_very_end_is_cut_short() {
    let mut bytes = gpu();
    put(&mut bytes, 0xd0, &[0x03, 0xfc]);
    put(&mut bytes, 0xfc, &[0x10, 0x00, 0x02, 0x00]);
    put(&mut bytes, 0x260, &[0x2e, 0x00, 0xc2, 0xff]);
    put(&mut bytes, 0xffc, &[0x03, 0x00, 0x01, 0x00]);
    let expected = [
        ConfigProblem::CutShort { list: List::Conventional, at: 0xfc },
        ConfigProblem::CutShort { list: List::Extended, at: 0xffc },
    ];
    assert_eq!(parse(&bytes).problems, expected);
}

#[test]
fn all_ones_is_a_function_that_is_gone() {
    for length in [1, 63, 64, 256, 4096] {
        let space = parse(&vec![0xff; length]);
        assert!(!space.alive);
        assert_eq!(space.header, None);
        assert_eq!(space.problems, [ConfigProblem::Gone]);
    }
}

#[test]
fn a_function_that_goes_while_it_is_read_is_listed_as_far_as_it_got() {
    let mut bytes = gpu();
    bytes[0x60..].fill(0xff);
    let space = parse(&bytes);
    assert!(space.alive);
    assert_eq!(space.capabilities.len(), 2);
    let stopped = ConfigProblem::Unreadable { list: List::Conventional, at: 0x60 };
    assert_eq!(space.problems, [stopped]);

    let mut bytes = gpu();
    bytes[0x150..].fill(0xff);
    let space = parse(&bytes);
    assert_eq!((space.capabilities.len(), space.extended.len()), (7, 1));
    let stopped = ConfigProblem::Unreadable { list: List::Extended, at: 0x150 };
    assert_eq!(space.problems, [stopped]);
}

#[test]
fn noise_behind_conventional_pci_is_no_extended_list() {
    let mut bytes = gpu();
    put(&mut bytes, 0x48, &[0x05, 0xa0]); // skips PCI Express
    let space = parse(&bytes);
    assert_eq!(space.extended, []);
    assert_eq!(space.problems, []);
    put(&mut bytes, 0xd0, &[0x07]); // PCI-X
    assert_eq!(parse(&bytes).extended.len(), 11);
}

#[test]
fn a_virtual_function_is_alive_without_ids() {
    let mut bytes = gpu();
    put(&mut bytes, 0, &[0xff; 4]);
    let space = parse(&bytes);
    assert!(space.alive);
    assert_eq!(space.header.map(|header| header.vendor), Some(0xffff));
    assert_eq!(space.capabilities.len(), 7);
}

#[test]
fn nothing_read_is_nothing_known() {
    let space = parse(&[]);
    assert!(!space.alive);
    assert_eq!(space.problems, [ConfigProblem::Truncated { coverage: 0 }]);
}

#[test]
fn lists_that_bite_their_tail_end_there() {
    let mut bytes = gpu();
    put(&mut bytes, 0xd0, &[0x03, 0x60]);
    put(&mut bytes, 0x260, &[0x2e, 0x00, 0x02, 0x26]);
    let space = parse(&bytes);
    let expected = [
        ConfigProblem::PointerLoop { list: List::Conventional, pointer: 0x60 },
        ConfigProblem::PointerLoop { list: List::Extended, pointer: 0x260 },
    ];
    assert_eq!(space.problems, expected);
    assert_eq!((space.capabilities.len(), space.extended.len()), (7, 11));
}

#[test]
fn pointers_into_the_header_or_the_other_list_are_not_followed() {
    let mut bytes = gpu();
    put(&mut bytes, 0xd0, &[0x03, 0x3c]);
    put(&mut bytes, 0x260, &[0x2e, 0x00, 0x02, 0x06]);
    let expected = [
        ConfigProblem::PointerOutOfRange { list: List::Conventional, pointer: 0x3c },
        ConfigProblem::PointerOutOfRange { list: List::Extended, pointer: 0x60 },
    ];
    assert_eq!(parse(&bytes).problems, expected);
}

#[test]
fn lists_can_be_absent() {
    let mut bytes = gpu();
    put(&mut bytes, 0x100, &[0; 4]);
    let space = parse(&bytes);
    assert_eq!(space.problems, []);
    assert_eq!((space.capabilities.len(), space.extended.len()), (7, 0));
    put(&mut bytes, 0x06, &[0x00]);
    let space = parse(&bytes);
    assert_eq!(space.problems, []);
    assert_eq!((space.capabilities.len(), space.extended.len()), (0, 0));
}

#[test]
fn bridges_have_buses_and_their_own_pointers() {
    let mut bytes = gpu();
    put(&mut bytes, 0x0e, &[0x01]);
    put(&mut bytes, 0x18, &[0x00, 0x03, 0x07]);
    let buses = Buses { primary: 0, secondary: 3, subordinate: 7 };
    let space = parse(&bytes);
    assert_eq!(space.header.map(|h| h.header_type), Some(HeaderType::Bridge(buses)));
    assert_eq!(space.capabilities.len(), 7);

    put(&mut bytes, 0x0e, &[0x82]);
    put(&mut bytes, 0x14, &[0xd0]);
    let space = parse(&bytes);
    assert_eq!(space.header.map(|h| h.header_type), Some(HeaderType::CardBus(buses)));
    assert_eq!(space.capabilities, [Capability::Other(0x03)]);

    put(&mut bytes, 0x0e, &[0x05]);
    let space = parse(&bytes);
    assert_eq!(space.header.map(|h| h.header_type), Some(HeaderType::Other(5)));
    assert_eq!(space.problems, [ConfigProblem::UnknownHeaderType(5)]);
    assert_eq!((space.capabilities.len(), space.extended.len()), (0, 0));
}

#[test]
fn garbage_is_walked_to_an_end() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    for round in 0..500_u32 {
        let mut bytes: Vec<u8> = (0..4096).map(|_| random()).collect();
        bytes[0x06] |= 0x10;
        bytes[0x0e] = (round % 4).to_le_bytes()[0];
        let space = parse(&bytes);
        // A member takes four bytes at least, so this is all there is room for.
        assert!(space.capabilities.len() <= (0x100 - 0x40) / 4);
        assert!(space.extended.len() <= (0x1000 - 0x100) / 4);
        assert!(space.header.is_some());
    }
}
