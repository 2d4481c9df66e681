//! Little-endian registers out of a slice. Touches nothing; a register that is not there is `None`.

/// What was read, or the part of it from some capability on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Bytes<'_> {
    /// All from `at` on.
    pub(super) fn from(self, at: u16) -> Self {
        Self(self.0.get(usize::from(at)..).unwrap_or_default())
    }

    pub(super) fn u8(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(super) fn u16(self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(super) fn u32(self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn array<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_little_endian_and_never_past_the_end() {
        let bytes = Bytes(&[0x86, 0x80, 0x22, 0x11]);
        assert_eq!(bytes.u16(0), Some(0x8086));
        assert_eq!(bytes.u32(0), Some(0x1122_8086));
        assert_eq!(bytes.from(2).u16(0), Some(0x1122));
        assert_eq!(bytes.u16(3), None);
        assert_eq!(bytes.u32(usize::MAX), None);
        assert_eq!(bytes.from(u16::MAX).u8(0), None);
    }
}
