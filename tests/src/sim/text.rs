//! How the kernel reads what is written to it (`lib/kstrtox.c`). Works on text, touches nothing.

use nix::errno::Errno;

/// `kstrtoul` with base 0 and its relatives: one newline may follow.
pub(super) fn number<T: TryFrom<u64>>(text: &str) -> Result<T, Errno> {
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_prefix('+').unwrap_or(text);
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if lower.len() > 1 && lower.starts_with('0') => (&lower[1..], 8),
        None => (lower.as_str(), 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(Errno::EINVAL);
    }
    let number = u64::from_str_radix(digits, radix).map_err(|_| Errno::ERANGE)?;
    T::try_from(number).map_err(|_| Errno::ERANGE)
}

/// `kstrtobool`: the first letter counts.
pub(super) fn boolean(text: &str) -> Result<bool, Errno> {
    match text.to_ascii_lowercase().as_bytes() {
        [b'y' | b't' | b'1', ..] | [b'o', b'n', ..] => Ok(true),
        [b'n' | b'f' | b'0', ..] | [b'o', b'f', ..] => Ok(false),
        _ => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_in_the_kernel() {
        assert_eq!(number::<u16>("4\n"), Ok(4));
        assert_eq!(number::<u16>("0x10"), Ok(16));
        assert_eq!(number::<u16>("010"), Ok(8));
        assert_eq!(number::<u16>("0"), Ok(0));
        assert_eq!(number::<u16>("65536"), Err(Errno::ERANGE));
        for bad in ["", "\n", "4 ", "-1", "4\n\n", "four", "0x", "++4"] {
            assert_eq!(number::<u16>(bad), Err(Errno::EINVAL), "{bad:?}");
        }
    }
}
