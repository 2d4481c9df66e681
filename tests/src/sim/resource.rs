//! Where a function's regions are: addresses handed out one after another, aligned as they must
//! be, and the text of sysfs `resource`. Touches nothing.

use std::fmt::Write;

use super::notation::BarSize;

/// A region with its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// Which BAR.
    pub(super) index: u8,
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) io: bool,
    pub(super) wide: bool,
    pub(super) prefetch: bool,
}

/// What is free.
#[derive(Debug)]
pub(super) struct Space {
    memory: u64,
    wide: u64,
    ports: u64,
}

impl Default for Space {
    fn default() -> Self {
        Self { memory: 0x8000_0000, wide: 0x40_0000_0000, ports: 0x1000 }
    }
}

impl Space {
    /// Places a function's BARs.
    pub(super) fn place(&mut self, bars: &[BarSize]) -> Vec<Region> {
        let mut index = 0;
        bars.iter()
            .map(|bar| {
                let free = match bar {
                    BarSize { io: true, .. } => &mut self.ports,
                    BarSize { wide: true, .. } => &mut self.wide,
                    _ => &mut self.memory,
                };
                let start = free.next_multiple_of(bar.size);
                *free = start + bar.size;
                let BarSize { size, io, wide, prefetch } = *bar;
                let region = Region { index, start, size, io, wide, prefetch };
                index += if wide { 2 } else { 1 };
                region
            })
            .collect()
    }
}

/// The text of sysfs `resource`: thirteen lines, the last six of which are for VFs and bridges.
pub(super) fn text(regions: &[Region]) -> String {
    let mut text = String::new();
    for index in 0..13 {
        let region = regions.iter().find(|region| region.index == index);
        let (start, end, flags) =
            region.map_or((0, 0, 0), |r| (r.start, r.start + r.size - 1, flags(*r)));
        // Writing to a string never fails.
        let _ = writeln!(text, "{start:#018x} {end:#018x} {flags:#018x}");
    }
    text
}

/// `IORESOURCE_*` of `include/linux/ioport.h`, with the low bits of the BAR itself.
fn flags(region: Region) -> u64 {
    if region.io {
        return 0x4_0101;
    }
    0x4_0200
        | u64::from(region.prefetch) << 13
        | u64::from(region.wide) << 20
        | u64::from(region.wide) << 2
        | u64::from(region.prefetch) << 3
}
