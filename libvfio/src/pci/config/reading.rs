//! Reading configuration space in parts. Each doubleword is an access to the device: a whole space
//! of 4096 bytes takes ten times as long as the parts that say something.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::CONVENTIONAL;

/// All of extended configuration space (`PCI_CFG_SPACE_EXP_SIZE`).
const WHOLE: usize = 4096;
/// What is read of an extended capability: the longest that is understood is SR-IOV with 0x40.
const CAPABILITY: usize = 0x48;
/// More capabilities than fit are a loop, which parsing reports.
const MOST_CAPABILITIES: usize = (WHOLE - CONVENTIONAL) / 8;

/// Reads what [`parse`](super::parse) understands of a function's `config`: the conventional space
/// whole, of the extended one its capabilities; what was not read is zero.
pub fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; WHOLE];
    let conventional = read_at(file, &mut bytes[..CONVENTIONAL], 0)?;
    let whole = usize::try_from(file.metadata()?.len()).unwrap_or(WHOLE);
    if conventional < CONVENTIONAL || whole < WHOLE {
        bytes.truncate(conventional);
        return Ok(bytes);
    }
    let mut at = CONVENTIONAL;
    for _ in 0..MOST_CAPABILITIES {
        let end = WHOLE.min(at + CAPABILITY);
        if read_at(file, &mut bytes[at..end], at)? < 4 {
            break;
        }
        let header = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        // The upper twelve bits point to the next, in doublewords (`PCI_EXT_CAP_NEXT`).
        let next = usize::try_from(header >> 20 & 0xffc).unwrap_or(0);
        if header == u32::MAX || next < CONVENTIONAL {
            break;
        }
        at = next;
    }
    Ok(bytes)
}

/// Reads until `buffer` is full or the file ends.
fn read_at(file: &File, buffer: &mut [u8], offset: usize) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], (offset + done) as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}
